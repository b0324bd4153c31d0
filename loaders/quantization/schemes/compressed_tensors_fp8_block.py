"""compressed-tensors' FP8_BLOCK (float-quantized): E4M3 with a scale for every 128 x 128 weights.

Shapes: R rows, C columns. By role:
    weight         F8_E4M3 (R, C)
    weight_scale   (ceil(R / 128), ceil(C / 128)), in the weights' dtype
The engine quantizes activations as it runs, 128 values of a token at a time, and cannot run matrices whose columns are
no multiple of 128: such matrices are read, but not written. Rows may end within a block. Bytes are those of
compressed-tensors 0.20, in edge blocks too; llm-compressor 0.14's model_free_ptq gives the same bytes, but cannot save
matrices with edge blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loaders.dtypes import DTYPES
from loaders.quantization.kernels import casts
from loaders.quantization.kernels.compressed_tensors.groups import BLOCK
from loaders.quantization.scheme import Block, Sink, Stored, View, Work
from loaders.quantization.schemes.compressed_tensors_int import (
    E4M3_STEPS,
    EPS,
    UNDERFLOW,
    is_ragged,
    refuses_matrix,
    scale_dtype,
)
from loaders.specs import StoredSpec, TensorSpec

# The number of weights in a band of 128 rows beyond which its memory counts as state. It is RANGE of
# loaders/backends/threads.py: a smaller band fits in the buffers that are planned for every thread.
LONG = 1 << 21


@dataclass(frozen=True, slots=True)
class Fp8Block:
    """Weights in E4M3 with a scale for each block of 128 x 128."""

    kind: ClassVar[str] = "fp8_block"
    engine: ClassVar[str] = "compressed-tensors"
    backends: ClassVar[tuple[str, ...]] = ("cpu",)
    error_limit: ClassVar[float] = 0.08  # see `RowScaled.error_limit`: the same codes

    def refuses(self, spec: TensorSpec) -> str | None:
        refusal = refuses_matrix(spec, "FP8_BLOCK")
        if refusal is None and spec.shape[1] % BLOCK:
            return (
                f"its {spec.shape[1]} columns do not divide into groups of {BLOCK}, and FP8_BLOCK's engines quantize"
                f" activations {BLOCK} at a time; fp8_dynamic takes rows of any length"
            )
        return refusal

    def is_ragged(self, spec: TensorSpec) -> bool:
        return is_ragged(spec, BLOCK)

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        rows, columns = spec.shape
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        return {
            "weight": StoredSpec(DTYPES["F8_E4M3"], spec.shape),
            "weight_scale": StoredSpec(scale_dtype(spec.dtype), blocks),
        }

    def state_bytes(self, spec: TensorSpec) -> int:
        """Return the bytes of a band of 128 rows, its weights and its codes, where it is longer than a range."""
        band = BLOCK * spec.shape[1]
        return 0 if band <= LONG else band * (1 + spec.dtype.item_bytes)

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        from loaders.quantization.kernels.compressed_tensors import fp8
        from loaders.quantization.kernels.cpu import kernel_input

        spec, columns, dtype = view.spec, view.spec.shape[1], scale_dtype(view.spec.dtype).name
        band, blocks = BLOCK * columns, -(-columns // BLOCK)

        def encode_range(start: int, stop: int) -> None:
            for first in range(start, stop, band):
                x = kernel_input(view.read(first, min(first + band, stop)), spec.dtype.name)
                codes = work.array("codes", x.size, np.uint8)
                scales = work.array("scales", blocks, np.float32)
                fp8.encode_band(x, columns, EPS[dtype], codes, scales)
                sink.write("weight", first, codes)
                sink.write("weight_scale", first // band * blocks, casts.cast(scales, "F32", dtype))

        work.sweep(spec.numel, band, encode_range)

    def range_align(self, spec: TensorSpec) -> int:
        return BLOCK * spec.shape[1]

    def align(self, spec: TensorSpec) -> int:
        """Return the items of a row, although scales belong to bands: a band may be large, and its scales are few."""
        return spec.shape[1]

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """The largest scale times E4M3_STEPS, as in `RowScaled.greatest_error`: the codes are the same."""
        return float(np.abs(self._scales(spec, stored, start, stop)).max(initial=0)) * E4M3_STEPS + 448 * UNDERFLOW

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels.compressed_tensors import fp8

        columns, scales = spec.shape[1], self._scales(spec, stored, start, stop)
        fp8.decode_blocks(stored.read("weight", start, stop), columns, start // columns % BLOCK, scales, out)

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels.compressed_tensors import fp8
        from loaders.quantization.kernels.cpu import kernel_input

        x, columns, scales = kernel_input(block, source), spec.shape[1], self._scales(spec, stored, start, stop)
        fp8.compare_blocks(x, stored.read("weight", start, stop), columns, start // columns % BLOCK, scales, sums)
        return True

    def _scales(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Return the scales of the bands that items [start, stop) reach: float32 (bands, blocks)."""
        columns = spec.shape[1]
        first, last, blocks = start // columns, -(-stop // columns), -(-columns // BLOCK)
        raw = stored.read("weight_scale", first // BLOCK * blocks, -(-last // BLOCK) * blocks)
        return casts.to_float32(raw, scale_dtype(spec.dtype).name).reshape(-1, blocks)
