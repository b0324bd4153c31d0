"""MLX's small floats, mxfp4, mxfp8 and nvfp4, as mlx-lm stores and loads them.

Groups are 32 weights (nvfp4: 16) of a row. Roles, which the layout names, for R rows of C weights:
    weight         uint32 (R, C * bits / 32)    E2M1 (4 bits) or E4M3 (8 bits), the first lowest
    weight_scales  uint8 (R, C / group)         exponents + 127 (E8M0); for nvfp4 E4M3
Bytes are those of mlx 0.32 on a CPU: see kernels/mlx/microfloat.py. The source of the Metal kernels
(mlx/backend/metal/kernels/fp_quantized.h and fp4.h; read, not run) gives slightly other bytes: halves go to the even
code of E2M1, its zeros keep their sign, nvfp4 multiplies by 1 / scale, and a group of zeros has mxfp's scale 2^-127.
mlx-lm writes no scale of the whole tensor for nvfp4, so that groups whose largest weight is below 0.006 vanish, and
those a little above are coarse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from loaders.dtypes import DTYPES, WEIGHT_DTYPES
from loaders.errors import LEAVE, setting
from loaders.quantization import grid as grids
from loaders.quantization.grid import Grid
from loaders.quantization.scheme import Block, Sink, Stored, View, Work, fits
from loaders.quantization.schemes.mlx_affine import SCALES
from loaders.specs import StoredSpec, TensorSpec

FloatMode = Literal["mxfp4", "mxfp8", "nvfp4"]
SETTINGS: dict[FloatMode, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size


@dataclass(frozen=True, slots=True)
class MlxFloat:
    """Weights as floats of `bits` bits times their group's scale."""

    kind: ClassVar[str] = "mlx_float"
    engine: ClassVar[str] = "mlx"
    backends: ClassVar[tuple[str, ...]] = ("cpu", "mlx")
    mode: FloatMode = "mxfp4"

    @property
    def bits(self) -> int:
        return SETTINGS[self.mode][0]

    @property
    def group_size(self) -> int:
        return SETTINGS[self.mode][1]

    @property
    def error_limit(self) -> float:
        """The error of the worst groups: one weight that sets the scale, and all others midway between two codes.

        That weight is at least 3 scales in mxfp4, half of the greatest code, and 5.25 in nvfp4, where rounding moves a
        scale of four steps or more by an eighth of itself; smaller scales are `error_floor`'s. mxfp8's E4M3 rounds a
        weight by at most 1/16 of it, or 2^-10 scales, where the largest weight is at least 224 scales.
        """
        from loaders.quantization.kernels.mlx import microfloat

        if self.mode == "mxfp8":
            return 1 / 16 + 1e-4
        top, others = {"mxfp4": 3.0, "nvfp4": 5.25}[self.mode], self.group_size - 1
        values = np.array(microfloat.E2M1[:8])
        middle, half = (values[1:] + values[:-1]) / 2, (values[1:] - values[:-1]) / 2
        return float(np.sqrt(others * half**2 / (top**2 + others * middle**2)).max()) * 1.001

    @property
    def error_floor(self) -> float:
        """The greatest code times what the least scales are off: nvfp4's are multiples of 2^-9, so half of that.

        mxfp's are computed in the weights' dtype first: float16 rounds them to multiples of 2^-24.
        """
        from loaders.quantization.kernels.mlx import microfloat_scales

        if self.mode == "nvfp4":
            return 6 * 2.0**-10
        return microfloat_scales.GREATEST[self.bits] * 2.0**-23

    def refuses(self, spec: TensorSpec) -> str | None:
        if spec.dtype.name not in WEIGHT_DTYPES:
            return f"its dtype is {spec.dtype}; MLX takes {', '.join(WEIGHT_DTYPES)}"
        if len(spec.shape) not in (2, 3) or spec.numel == 0:
            return f"its shape is {list(spec.shape)}; MLX quantizes matrices, one or a stack of them"
        if spec.shape[-1] % self.group_size:
            return f"its rows of {spec.shape[-1]} do not divide into groups of {self.group_size}; {setting(LEAVE)}"
        return None

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        *rows, columns = spec.shape
        return {
            "weight": StoredSpec(DTYPES["U32"], (*rows, columns * self.bits // 32)),
            SCALES: StoredSpec(DTYPES["U8"], (*rows, columns // self.group_size)),
        }

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        from loaders.quantization.kernels.cpu import kernel_input
        from loaders.quantization.kernels.mlx_device import MlxCoder

        spec, group, bits = view.spec, self.group_size, self.bits

        def encode_range(start: int, stop: int) -> None:
            if fits(work.kernels, MlxCoder):
                raw = view.read(start, stop)
                codes, scales, _ = work.kernels.mlx_codes(raw, spec.dtype.name, self.mode, bits, group)
                sink.write("weight", start * bits // 32, codes.view(np.uint32))
                sink.write(SCALES, start // group, scales)
                return
            packed = work.array("packed", (stop - start) * bits // 8, np.uint8)
            scales = work.array("scales", (stop - start) // group, np.uint8)
            self.code(kernel_input(view.read(start, stop), spec.dtype.name), packed, scales)
            sink.write("weight", start * bits // 32, packed.view(np.uint32))
            sink.write(SCALES, start // group, scales)

        work.sweep(spec.numel, group, encode_range)

    def code(self, x: np.ndarray, packed: np.ndarray, scales: np.ndarray) -> None:
        """Code whole groups of raw weights (n,) into packed, uint8 (n * bits / 8,), and scales, uint8 (n / group,)."""
        from loaders.quantization.kernels.mlx import microfloat, microfloat_scales

        rows = microfloat.thresholds_of(self.mode) if self.bits == 4 else np.empty(0, np.int16)
        limits, values = microfloat_scales.power_limits(), microfloat_scales.scale_values(self.mode)
        greatest = np.float32(microfloat_scales.GREATEST[self.bits])
        microfloat.encode(x, self.group_size, self.bits, greatest, limits, values, rows, packed, scales)

    def range_align(self, spec: TensorSpec) -> int:
        return self.align(spec)

    def align(self, spec: TensorSpec) -> int:
        return self.group_size

    @property
    def _gaps(self) -> tuple[float, float, float]:
        """The greatest code, half the gap between codes at zero, and how it grows with a value: see grid.py."""
        if self.bits == 4:
            return 6, grids.E2M1_HALF, grids.E2M1_SLOPE + grids.SMALL
        return 448, grids.E4M3_HALF, grids.E4M3_SLOPE + grids.SMALL

    def grid(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> Grid:
        """Return the grid of the stored scales, by which the codes were found."""
        from loaders.quantization.kernels.mlx import microfloat_scales

        scales = stored.read(SCALES, start // self.group_size, stop // self.group_size)
        return grids.symmetric(self.group_size, microfloat_scales.scale_values(self.mode)[scales], *self._gaps)

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels.cpu import kernel_input
        from loaders.quantization.kernels.mlx import microfloat, microfloat_scales

        group, values = self.group_size, microfloat_scales.scale_values(self.mode)
        codes = stored.read("weight", start * self.bits // 32, stop * self.bits // 32).view(np.uint8)
        scales = stored.read(SCALES, start // group, stop // group)
        terms = grids.symmetric_terms(*self._gaps, source != spec.dtype.name)
        x = kernel_input(block, source)
        microfloat.compare(x, codes, scales, values, group, self.bits, terms, sums)
        return True

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels.mlx import microfloat, microfloat_scales

        group = self.group_size
        scales = microfloat_scales.scale_values(self.mode)[stored.read(SCALES, start // group, stop // group)]
        codes = stored.read("weight", start * self.bits // 32, stop * self.bits // 32).view(np.uint8)
        if self.bits == 4:
            microfloat.decode_e2m1(codes, scales, group, out)
        else:
            microfloat.decode_e4m3(codes, scales, out)
