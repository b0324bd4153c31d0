"""Statistics of loading and of compression, which can be added up over tensors, units and machines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loaders.errors import BadCheckpoint, io_errors
from loaders.storage.atomic import write_file

# The share of the source in the page cache from which a load is called warm; below one minus it, cold. The share is
# sampled, so neither end is exactly 1 or 0.
MOST = 0.9


class Figure(float):
    """A number that is also an answer: `stats.throughput_gbps` and `stats.throughput_gbps()` give the same."""

    __slots__ = ()

    def __call__(self) -> float:
        return float(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """The time and memory that a load or a unit took. Adding two adds their seconds, also `wall_s` of parallel units.

    `warm_bytes` of the source were in the page cache when reading began, `cold_bytes` were not. They are estimated from
    samples; both are 0 if the system does not tell.
    """

    files: int = 0  # weight files that were read
    tensors: int = 0  # tensors that were produced; one that is made in pieces counts with its last piece
    bytes: int = 0  # bytes of the source, as stored: before decoding, casting or quantizing
    read_s: float = 0.0  # thread seconds of waiting for the source; for memory maps, of mapping only
    encode_s: float = 0.0  # thread seconds of casting and quantizing, less the reading and writing inside
    measure_s: float = 0.0  # thread seconds of decoding what was quantized and comparing it with its source
    write_s: float = 0.0  # thread seconds of writing an output
    upload_s: float = 0.0  # thread seconds of moving finished files to a store that is not local
    wall_s: float = 0.0  # seconds from opening the files to the last tensor
    peak_anonymous_bytes: int = 0  # peak of anonymous memory above what the process held before; no mapped pages
    warm_bytes: int = 0  # part of `bytes`
    cold_bytes: int = 0  # part of `bytes`

    @property
    def seconds(self) -> float:
        """The wall time in seconds."""
        return self.wall_s

    @property
    def temperature(self) -> str:
        """The state of the page cache: "warm" (it held 90% of the source or more), "cold" (10% or less), "mixed", or
        "unknown".
        """
        known = self.warm_bytes + self.cold_bytes
        if not known:
            return "unknown"
        share = self.warm_bytes / known
        return "warm" if share >= MOST else "cold" if share <= 1 - MOST else "mixed"

    @property
    def throughput_gbps(self) -> Figure:
        """Gigabytes (1e9 bytes) of source per second of wall time; a number, which may also be called."""
        return Figure(self.bytes / self.wall_s / 1e9 if self.wall_s else 0.0)

    def __add__(self, other: LoadStats) -> LoadStats:
        return LoadStats(
            files=self.files + other.files,
            tensors=self.tensors + other.tensors,
            bytes=self.bytes + other.bytes,
            read_s=self.read_s + other.read_s,
            encode_s=self.encode_s + other.encode_s,
            measure_s=self.measure_s + other.measure_s,
            write_s=self.write_s + other.write_s,
            upload_s=self.upload_s + other.upload_s,
            wall_s=self.wall_s + other.wall_s,
            peak_anonymous_bytes=max(self.peak_anonymous_bytes, other.peak_anonymous_bytes),
            warm_bytes=self.warm_bytes + other.warm_bytes,
            cold_bytes=self.cold_bytes + other.cold_bytes,
        )

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors of {self.files} files, {self.bytes / 1e6:.1f} MB in {self.wall_s:.3g} s:"
            f" {self.throughput_gbps:.3g} GB/s, {self.temperature}; peak {self.peak_anonymous_bytes / 1e6:.1f} MB"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSums:
    """Sums over the weights of one or many tensors, from which error metrics follow.

    x is a weight of the source, y the decoded weight, e = x - y. Sums add up exactly over ranges and units, where
    ratios such as the relative error do not.
    """

    numel: int = 0  # weights
    error2: float = 0.0  # sum e^2
    source2: float = 0.0  # sum x^2
    decoded2: float = 0.0  # sum y^2
    product: float = 0.0  # sum x y
    max_error: float = 0.0  # max |e|
    nonfinite: int = 0  # NaN and infinities of the source, which the sums leave out
    nonfinite_decoded: int = 0  # NaN and infinities that appeared only in the decoded weights
    wrong: int = 0  # ranges with a decoded weight that no correct encoder or copy could produce: see `measure`

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums.total((self, other))

    @staticmethod
    def total(parts: Iterable[ErrorSums]) -> ErrorSums:
        """Return the sum of many, added in this order: the same as by `+`, without an object for each."""
        numel, error2, source2, decoded2, product = 0, 0.0, 0.0, 0.0, 0.0
        max_error, nonfinite, nonfinite_decoded, wrong = 0.0, 0, 0, 0
        for each in parts:
            numel += each.numel
            error2 += each.error2
            source2 += each.source2
            decoded2 += each.decoded2
            product += each.product
            max_error = max(max_error, each.max_error)
            nonfinite += each.nonfinite
            nonfinite_decoded += each.nonfinite_decoded
            wrong += each.wrong
        return ErrorSums(
            numel=numel,
            error2=error2,
            source2=source2,
            decoded2=decoded2,
            product=product,
            max_error=max_error,
            nonfinite=nonfinite,
            nonfinite_decoded=nonfinite_decoded,
            wrong=wrong,
        )

    @property
    def relative_error(self) -> float:
        """The relative error sqrt(sum e^2 / sum x^2): 0 is exact; infinite if weights that are all 0 were changed."""
        if self.error2 == 0:
            return 0.0
        return math.sqrt(self.error2 / self.source2) if self.source2 else math.inf

    @property
    def mse(self) -> float:
        """The mean squared error, sum e^2 / weights, in the unit of the weights squared; 0 if there are none."""
        return self.error2 / self.numel if self.numel else 0.0

    @property
    def sqnr_db(self) -> float:
        """The signal to quantization noise ratio in decibels; infinite if exact."""
        return -20 * math.log10(self.relative_error) if 0 < self.relative_error < math.inf else math.inf

    @property
    def cosine(self) -> float:
        """The cosine similarity of source and decoded weights; 1 if either is all zeros."""
        norm = math.sqrt(self.source2 * self.decoded2)
        return self.product / norm if norm else 1.0


@dataclass(frozen=True, slots=True)
class LayerStats:
    """The size and error of one quantized tensor. `scheme` is the kind of its quantization.

    `error` has the sums, from which the relative error and the mean squared one follow. As a mapping of figures, which
    is how others have a layer's statistics, it answers to "num_params", "compression_ratio" and "error"; the last is
    then the mean squared error, one number.
    """

    scheme: str
    parameters: int  # weights
    source_bytes: int  # as stored in the source
    output_bytes: int  # codes, scales and everything else that is stored for it
    error: ErrorSums

    @property
    def num_params(self) -> int:
        """The same as `parameters`."""
        return self.parameters

    @property
    def compression_ratio(self) -> float:
        """Source bytes over output bytes; 0 if there is no output."""
        return self.source_bytes / self.output_bytes if self.output_bytes else 0.0

    @property
    def mse(self) -> float:
        """The mean squared error of its weights."""
        return self.error.mse

    @property
    def relative_error(self) -> float:
        """The relative error of its weights, sqrt(sum e^2 / sum x^2)."""
        return self.error.relative_error

    def __getitem__(self, figure: str) -> float:
        figures = {"num_params": self.num_params, "compression_ratio": self.compression_ratio, "error": self.mse}
        return figures[figure]


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class CompressionStats:
    """The size and error of a whole output. `layer_stats` has its quantized tensors by name, if they were recorded.

    Errors called `..._error` are relative, sqrt(sum e^2 / sum x^2), and so comparable between models; those called
    `..._mse` are mean squared, as other tools report them.
    """

    tensors: int = 0  # tensors of the source, including those that stay unquantized
    parameters: int = 0  # weights in them
    source_bytes: int = 0  # as stored in the source
    output_bytes: int = 0  # as stored in the output
    error: ErrorSums = ErrorSums()  # over the quantized tensors
    layer_stats: Mapping[str, LayerStats] = field(default_factory=dict)

    def __add__(self, other: CompressionStats) -> CompressionStats:
        return CompressionStats(
            tensors=self.tensors + other.tensors,
            parameters=self.parameters + other.parameters,
            source_bytes=self.source_bytes + other.source_bytes,
            output_bytes=self.output_bytes + other.output_bytes,
            error=self.error + other.error,
            layer_stats={**self.layer_stats, **other.layer_stats} if other.layer_stats else self.layer_stats,
        )

    @property
    def total_parameters(self) -> int:
        """The number of weights in all tensors."""
        return self.parameters

    @property
    def original_size_mb(self) -> float:
        """The size of the source in megabytes (1e6 bytes)."""
        return self.source_bytes / 1e6

    @property
    def quantized_size_mb(self) -> float:
        """The size of the output in megabytes (1e6 bytes), including tensors that stay unquantized."""
        return self.output_bytes / 1e6

    @property
    def ratio(self) -> float:
        """Source bytes over output bytes: how many times smaller the output is; 0 if it is empty."""
        return self.source_bytes / self.output_bytes if self.output_bytes else 0.0

    @property
    def compression_ratio(self) -> float:
        """The same as `ratio`."""
        return self.ratio

    @property
    def bits_per_weight(self) -> float:
        """Bits of the output per weight, over all tensors."""
        return self.output_bytes * 8 / self.parameters if self.parameters else 0.0

    @property
    def total_error(self) -> float:
        """The relative error, sqrt(sum e^2 / sum x^2), over every weight of every tensor."""
        return self.error.relative_error

    @property
    def mean_layer_error(self) -> float:
        """The unweighted mean of the relative errors in `layer_stats`; 0 if it is empty."""
        errors = [layer.error.relative_error for layer in self.layer_stats.values()]
        return sum(errors) / len(errors) if errors else 0.0

    @property
    def max_layer_error(self) -> float:
        """The largest relative error in `layer_stats`; 0 if it is empty."""
        return max((layer.error.relative_error for layer in self.layer_stats.values()), default=0.0)

    @property
    def total_mse(self) -> float:
        """The mean squared error over every quantized weight."""
        return self.error.mse

    @property
    def mean_layer_mse(self) -> float:
        """The unweighted mean of the mean squared errors in `layer_stats`; 0 if it is empty."""
        errors = [layer.mse for layer in self.layer_stats.values()]
        return sum(errors) / len(errors) if errors else 0.0

    @property
    def max_layer_mse(self) -> float:
        """The largest mean squared error in `layer_stats`; 0 if it is empty."""
        return max((layer.mse for layer in self.layer_stats.values()), default=0.0)

    def __repr__(self) -> str:
        layers = (
            f", {len(self.layer_stats)} layers: mean error {self.mean_layer_error:.4g}, max {self.max_layer_error:.4g}"
            if self.layer_stats
            else ""
        )
        return (
            f"CompressionStats({self.tensors} tensors, {self.parameters:,} parameters: {self.original_size_mb:.2f} MB"
            f" -> {self.quantized_size_mb:.2f} MB, {self.ratio:.2f}x smaller,"
            f" {self.bits_per_weight:.2f} bits per weight, error {self.total_error:.4g}{layers})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the totals and the metrics derived from them, as JSON values."""
        return {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
            "relative_error": self.error.relative_error,
            "sqnr_db": finite(self.error.sqnr_db),
            "cosine": self.error.cosine,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, atomically: the values that `load` reads back, and the derived FIGURES.

        Raises:
            StorageError: the file cannot be written.
        """
        document = {
            **{key: getattr(self, key) for key in TOTALS},
            "error": sums_json(self.error),
            "layer_stats": {
                name: {
                    **asdict(layer),
                    "error": sums_json(layer.error),
                    "compression_ratio": layer.compression_ratio,
                    "relative_error": finite(layer.relative_error),
                    "mse": finite(layer.mse),
                }
                for name, layer in self.layer_stats.items()
            },
            **{key: finite(getattr(self, key)) for key in FIGURES},
        }
        write_file(Path(path), (json.dumps(document, indent=2) + "\n").encode())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> CompressionStats:
        """Read a file that `save` wrote.

        Raises:
            BadCheckpoint: the file holds something else.
            StorageError: the file cannot be read.
        """
        with io_errors("reading", path):
            raw = Path(path).read_bytes()
        try:
            found = json.loads(raw)
            layers = {
                name: LayerStats(
                    each["scheme"], each["parameters"], each["source_bytes"], each["output_bytes"],
                    sums_of(each["error"]),
                )
                for name, each in found["layer_stats"].items()
            }  # fmt: skip
            totals = {key: found[key] for key in TOTALS}
            return CompressionStats(**totals, error=sums_of(found["error"]), layer_stats=layers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{os.fspath(path)}: not saved by CompressionStats ({error!r})") from None


TOTALS = ("tensors", "parameters", "source_bytes", "output_bytes")
FIGURES = (
    "original_size_mb", "quantized_size_mb", "compression_ratio", "total_error", "mean_layer_error", "max_layer_error",
    "total_parameters", "total_mse", "mean_layer_mse", "max_layer_mse",
)  # fmt: skip


def sums_json(sums: ErrorSums) -> dict[str, Any]:
    """Return the sums as JSON values. JSON has no infinities; they become null, and nothing else does."""
    return {key: finite(value) if isinstance(value, float) else value for key, value in asdict(sums).items()}


def sums_of(found: Mapping[str, Any]) -> ErrorSums:
    """Return the sums that `sums_json` was given."""
    values: dict[str, Any] = {key: math.inf if value is None else value for key, value in found.items()}
    return ErrorSums(**values)


def finite(number: float) -> float | None:
    """Return the number, or None for NaN and infinities, which JSON lacks."""
    return number if math.isfinite(number) else None
