"""`python -m jobs.bench layers`: small layers quantized while they are loaded, beside a published loader's figures.

The published ones are of a loader to ternary weights, by its own tests: two layers of 64 x 128 and 128 x 256, "a file
of 9.98 MB", and what it expects of BitNet 1.3B with its aggressive setting. Which values its layers had is not
published; here they are normally distributed with variance 1, float32. The file of about 10 MB has as many pairs of
these layers as that takes. Of BitNet 1.3B there are the shapes, in bfloat16, and no values: they tell sizes alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Group
from rich.text import Text

from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.timing import Case, rotate
from jobs.cli.verb import Said, note
from jobs.report.tables import table
from loaders.dtypes import DTYPES, Shape
from loaders.loading.checkpoint_loader import CheckpointLoader
from loaders.loading.config import WeightLoaderConfig
from loaders.stats import CompressionStats

PAIR = {"layer1": (64, 128), "layer2": (128, 256)}
FILE_BYTES = 9_980_000
QUANTS = ("ternary", "ternary_aggressive", "hqq2", "nf4")
TWO, TEN, BITNET = "two layers", "10 MB of them", "BitNet 1.3B"
PUBLISHED = {
    "ratio": 3.88, "mean_mse": 0.213, "max_mse": 0.234, "seconds": 0.5, "seconds_a_layer": 0.1, "ratio_bitnet": 6.2
}  # fmt: skip
HIDDEN, INNER, LAYERS, VOCABULARY = 2048, 5460, 24, 32002  # BitNet b1.58 1.3B
SAID = (
    "published: 3.88 times smaller, mean squared error 0.213 in the mean and 0.234 at most, under 0.5 s, about 0.1 s a"
    " layer; BitNet 1.3B, aggressive: 6.2 times. Values of those layers are not published; ours are normally"
    " distributed, variance 1, float32. Of BitNet 1.3B only the sizes are known: its file here has no values"
)


def time_layers(folder: str | None, repeats: int) -> Said:
    """Time loading to ternary and other types, and say sizes and mean squared errors, from the page cache."""
    busy = Busy()
    with tempfile.TemporaryDirectory(dir=folder, prefix="weightmill-bench-") as made:
        loads = [Load(name, path, quant) for name, path in _small(Path(made)) for quant in QUANTS]
        note(f"loading two files in {len(loads)} ways, {repeats} laps each, after one that does not count")
        cases = [Case(load.quant, load) for load in loads]
        rotate(cases, repeats)
        rows = [load.row(case.seconds) for load, case in zip(loads, cases, strict=True)]
        large = _large(Path(made))
        for quant in ("ternary", "ternary_aggressive"):
            sizes = Load(BITNET, large, quant, is_measured=False)
            sizes()
            rows.append(sizes.row([]))
    numbers = ("MB", "quantized MB", "times smaller", "mean MSE", "max MSE", "median s", "s a layer")
    shown = table("file", "quantization", *numbers, right=numbers)
    for row in rows:
        measured = ("mean_mse", "max_mse", "median_s", "seconds_a_layer")
        shown.add_row(
            row["source"], row["quant"], f"{row['mb']:.2f}", f"{row['quantized_mb']:.2f}", f"{row['ratio']:.2f}",
            *("" if row[key] is None else f"{row[key]:.3g}" for key in measured),
        )  # fmt: skip
    here, taken = machine(), busy.document()
    said = warning(taken)
    text = Group(here, shown, SAID, *([] if said is None else [Text(said, style="yellow")]))
    return Said({"status": "done", "machine": here, "busy": taken, "published": PUBLISHED, "rows": rows}, text)


class Load:
    """A case that loads a file by a quantization, without a cache."""

    def __init__(self, source: str, path: Path, quant: str, *, is_measured: bool = True) -> None:
        self.quant = quant
        self._source = source
        self._path = path
        self._is_measured = is_measured
        self._stats = CompressionStats()

    def __call__(self) -> None:
        config = WeightLoaderConfig(
            quantization_config=self.quant, dtype=None, use_cache=False, compute_error=self._is_measured
        )
        by = CheckpointLoader(config)
        by.load(self._path)
        self._stats = by.get_stats()

    def row(self, seconds: Sequence[float]) -> dict[str, Any]:
        """Return what the last load gave, and the times of all; None for what was not measured."""
        stats, taken = self._stats, median(seconds) if seconds else None
        return {
            "source": self._source, "quant": self.quant, "mb": stats.original_size_mb,
            "quantized_mb": stats.quantized_size_mb, "ratio": stats.compression_ratio,
            "mean_mse": stats.mean_layer_mse if self._is_measured else None,
            "max_mse": stats.max_layer_mse if self._is_measured else None,
            "median_s": taken, "seconds_a_layer": taken / len(stats.layer_stats) if taken else None,
            "laps": len(seconds),
        }  # fmt: skip


def _small(folder: Path) -> Iterator[tuple[str, Path]]:
    pairs = round(FILE_BYTES / sum(4 * rows * columns for rows, columns in PAIR.values()))
    for name, count in ((TWO, 1), (TEN, pairs)):
        shapes = {f"{layer}.{pair}.weight": shape for pair in range(count) for layer, shape in PAIR.items()}
        path = _header(folder / f"{count}.safetensors", shapes, "F32")
        with path.open("ab") as file:
            for number, shape in enumerate(shapes.values()):
                file.write(np.random.default_rng(number).standard_normal(shape).astype(np.float32).tobytes())
        yield name, path


def _large(folder: Path) -> Path:
    """Write a file of BitNet's shapes whose weights are a hole, which takes no disk."""
    layer: dict[str, Shape] = {
        **{f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")},
        "mlp.down_proj.weight": (HIDDEN, INNER), "input_layernorm.weight": (HIDDEN,),
    }  # fmt: skip
    shapes = {f"model.layers.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    path = _header(folder / "bitnet.safetensors", {**shapes, **ends}, "BF16")
    with path.open("ab") as file:
        file.truncate(file.tell() + sum(DTYPES["BF16"].size(shape) for shape in (*shapes.values(), *ends.values())))
    return path


def _header(path: Path, shapes: Mapping[str, Shape], dtype: str) -> Path:
    """Begin a safetensors file: all but its weights."""
    header, at = dict[str, Any](), 0
    for name, shape in shapes.items():
        end = at + DTYPES[dtype].size(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    return path
