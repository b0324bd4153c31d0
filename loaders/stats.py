"""Numbers about loading and about compression. Both add up over tensors, units and machines."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MOST = 0.9


@dataclass(frozen=True, slots=True)
class LoadStats:
    """What reading and working took. Seconds of several threads add up; `wall_s` of units side by side does, too.

    `warm_bytes` of the source were in the page cache when reading began, `cold_bytes` were not: by samples, where the
    system tells; elsewhere both are 0.
    """

    files: int = 0
    tensors: int = 0
    bytes: int = 0
    read_s: float = 0.0
    encode_s: float = 0.0
    measure_s: float = 0.0
    write_s: float = 0.0
    wall_s: float = 0.0
    peak_anonymous_bytes: int = 0  # beyond what the process held before
    warm_bytes: int = 0
    cold_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.wall_s

    @property
    def temperature(self) -> str:
        """What the source was: "warm" (nine tenths in the page cache, or more), "cold" (a tenth or less), "mixed", or
        "unknown".
        """
        known = self.warm_bytes + self.cold_bytes
        if not known:
            return "unknown"
        share = self.warm_bytes / known
        return "warm" if share >= MOST else "cold" if share <= 1 - MOST else "mixed"

    @property
    def throughput_gbps(self) -> float:
        """Gigabytes (1e9) of source a second of wall time."""
        return self.bytes / self.wall_s / 1e9 if self.wall_s else 0.0

    def __add__(self, other: LoadStats) -> LoadStats:
        return LoadStats(
            self.files + other.files,
            self.tensors + other.tensors,
            self.bytes + other.bytes,
            self.read_s + other.read_s,
            self.encode_s + other.encode_s,
            self.measure_s + other.measure_s,
            self.write_s + other.write_s,
            self.wall_s + other.wall_s,
            max(self.peak_anonymous_bytes, other.peak_anonymous_bytes),
            self.warm_bytes + other.warm_bytes,
            self.cold_bytes + other.cold_bytes,
        )

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors of {self.files} files, {self.bytes / 1e6:.1f} MB in {self.wall_s:.3g} s:"
            f" {self.throughput_gbps:.3g} GB/s, {self.temperature}; peak {self.peak_anonymous_bytes / 1e6:.1f} MB"
        )


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """Sums over the weights of a tensor or of many: e is source less decoded, x the source, y the decoded."""

    numel: int = 0
    error2: float = 0.0
    source2: float = 0.0
    decoded2: float = 0.0
    product: float = 0.0
    max_error: float = 0.0
    nonfinite: int = 0  # NaN and infinities of the source, left out of the sums
    nonfinite_decoded: int = 0  # those that only decoding brought

    @staticmethod
    def of(numel: int, sums: np.ndarray) -> ErrorSums:
        """From the slots of kernels/compare.py."""
        from loaders.quantization.kernels import compare  # whoever only loads needs no kernels

        return ErrorSums(
            numel,
            float(sums[compare.ERROR2]),
            float(sums[compare.SOURCE2]),
            float(sums[compare.DECODED2]),
            float(sums[compare.PRODUCT]),
            float(sums[compare.MAX_ERROR]),
            int(sums[compare.NONFINITE]),
            int(sums[compare.NONFINITE_DECODED]),
        )

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.numel + other.numel,
            self.error2 + other.error2,
            self.source2 + other.source2,
            self.decoded2 + other.decoded2,
            self.product + other.product,
            max(self.max_error, other.max_error),
            self.nonfinite + other.nonfinite,
            self.nonfinite_decoded + other.nonfinite_decoded,
        )

    @property
    def relative_error(self) -> float:
        """sqrt(sum e^2 / sum x^2): 0 is exact; infinite where zeros came back as something."""
        if self.error2 == 0:
            return 0.0
        return math.sqrt(self.error2 / self.source2) if self.source2 else math.inf

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, decibels; infinite when exact."""
        return -20 * math.log10(self.relative_error) if 0 < self.relative_error < math.inf else math.inf

    @property
    def cosine(self) -> float:
        """Of source and decoded, 1 where both are all zeros."""
        norm = math.sqrt(self.source2 * self.decoded2)
        return self.product / norm if norm else 1.0


@dataclass(frozen=True, slots=True)
class CompressionStats:
    """What a target came to."""

    tensors: int = 0
    parameters: int = 0
    source_bytes: int = 0
    output_bytes: int = 0
    error: ErrorSums = ErrorSums()

    def __add__(self, other: CompressionStats) -> CompressionStats:
        return CompressionStats(
            self.tensors + other.tensors,
            self.parameters + other.parameters,
            self.source_bytes + other.source_bytes,
            self.output_bytes + other.output_bytes,
            self.error + other.error,
        )

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.source_bytes / self.output_bytes if self.output_bytes else 0.0

    @property
    def bits_per_weight(self) -> float:
        """All stored bytes over all parameters."""
        return self.output_bytes * 8 / self.parameters if self.parameters else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            **{key: value for key, value in asdict(self).items() if key != "error"},
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
            "relative_error": self.error.relative_error,
            "sqnr_db": finite(self.error.sqnr_db),
            "cosine": self.error.cosine,
        }


def finite(number: float) -> float | None:
    """The number, or None where JSON has no way to say it."""
    return number if math.isfinite(number) else None
