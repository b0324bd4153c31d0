"""The decoder of float8 weights with a scale for each block, as DeepSeek V3 and transformers' `fp8` store them.

They are read, not written. By role: weight, F8_E4M3 (..., R, C); weight_scale_inv (..., ceil(R/rows), ceil(C/columns)),
which despite its name is multiplied with: float32, or powers of two as F8_E8M0 bytes (`scale_fmt` ue8m0). Blocks at the
lower and right edges are cut off. A block of None means one scale for the whole matrix.

Values are code * scale in float32, as transformers' Fp8Dequantize (integrations/finegrained_fp8.py) computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loaders.dtypes import Shape
from loaders.quantization.boxes import ByBoxes, matrices, read_rows
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Stored, Work
from loaders.specs import TensorSpec

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


@dataclass(frozen=True)
class Fp8Blocks(ByBoxes):
    """E4M3 in blocks of (rows, columns). `scale_dtype` is that of stored scales; U8 means E8M0, as F8_E8M0 does."""

    kind: ClassVar[str] = "fp8"
    block: tuple[int, int] | None
    scale_dtype: str

    def scale_shape(self, shape: Shape) -> Shape:
        """Return the shape of the scales of a weight. A single scale may also be stored without dimensions."""
        if self.block is None:
            return (*shape[:-2], 1, 1)
        return (*shape[:-2], -(-shape[-2] // self.block[0]), -(-shape[-1] // self.block[1]))

    def decode_box(
        self, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
    ) -> None:
        from loaders.quantization.kernels.read_only import fp8_int8

        _, high, wide = matrices(spec.shape)
        down, across = self.scale_shape(spec.shape)[-2:]
        block = self.block or (high, wide)
        every = np.arange(rows.start, rows.stop, rows.step, dtype=np.int64)
        scale_rows = every // high * down + every % high // block[0]
        first, last = int(scale_rows[0]), int(scale_rows[-1]) + 1
        raw = stored.read("weight_scale_inv", first * across, last * across)
        scales = e8m0(raw) if self.scale_dtype in ("F8_E8M0", "U8") else casts.to_float32(raw, self.scale_dtype)
        codes = read_rows(stored, "weight", rows, wide)[:, columns.start : columns.stop]
        fp8_int8.decode_e4m3(codes, scales.reshape(-1, across), scale_rows - first, columns.start, block[1], out)


def e8m0(codes: np.ndarray) -> np.ndarray:
    """Decode E8M0, 2**(code - 127), to float32; 255 is NaN (OCP Microscaling Formats specification 1.0)."""
    bits = codes.astype(np.uint32) << np.uint32(23)
    bits[codes == 0] = 0x00400000  # 2**-127 is subnormal, and has no exponent bits
    bits[codes == 255] = 0x7FC00000
    return bits.view(np.float32)
