"""MLX's affine weights, as mlx-lm stores and loads them.

Groups are `group_size` weights of a row. Roles, which the layout names, for R rows of C weights:
    weight         uint32 (R, C * bits / 32)    codes as a stream of bits, the first lowest
    weight_scales  (R, C / group_size)          in the weights' own dtype
    weight_biases  (R, C / group_size)          likewise
A weight is code * scale + bias. Bytes are those of mlx 0.32 on a CPU. Its Metal kernel
(mlx/backend/metal/kernels/quantized.h, affine_quantize; read, not run) gives slightly other ones: there a group's
greatest weight counts as at least 0, and halves round away from zero, so that about 2 codes in a thousand of bfloat16
weights differ by one. Both are equally good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loaders.dtypes import DTYPES, WEIGHT_DTYPES, DType, storage_of
from loaders.errors import LEAVE, setting
from loaders.quantization.grid import LEAST, ROUNDING, SMALL
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Block, PartRange, Sink, Stored, View, Work, fits
from loaders.specs import StoredSpec, TensorSpec

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SCALES, BIASES = "weight_scales", "weight_biases"


@dataclass(frozen=True, slots=True)
class MlxAffine:
    """Weights as codes of `bits` bits between a group's least and greatest weight."""

    kind: ClassVar[str] = "mlx"
    engine: ClassVar[str] = "mlx"
    backends: ClassVar[tuple[str, ...]] = ("cpu", "mlx", "cuda")
    mode: ClassVar[str] = "affine"
    group_sizes: ClassVar[tuple[int, ...]] = GROUP_SIZES
    bits: int = 4
    group_size: int = 64

    @property
    def error_limit(self) -> float:
        """The error of the worst groups: one weight of magnitude E, and all others half a step from zero.

        A step is at most E / floor(n / 2), n = 2^bits - 1, since scale <= 2 E / n and E / scale is rounded. Zero, where
        it lies within the range, is the value of a code, so that no weight's error exceeds the weight or half a step.
        Weights cut off at the far end, by up to one step, are near E themselves and weigh less. The last term is for
        scale and bias in bfloat16, whose roundings move a weight by up to 2^-9 of n steps and E: 3 E.
        """
        half = 0.5 / ((1 << self.bits) - 1 >> 1)
        others = (self.group_size - 1) * half**2
        return math.sqrt(others / (1 + others)) + 3 * 2**-9 * math.sqrt(self.group_size)

    @property
    def error_floor(self) -> float:
        """The least step, and half of 2^-24 times the number of codes: float16 scales are multiples of 2^-24."""
        from loaders.quantization.kernels.mlx import affine

        return affine.SMALLEST_SCALE + 2.0 ** (self.bits - 25)

    def refuses(self, spec: TensorSpec) -> str | None:
        if spec.dtype.name not in WEIGHT_DTYPES:
            return f"its dtype is {spec.dtype}; MLX takes {', '.join(WEIGHT_DTYPES)}"
        if len(spec.shape) not in (2, 3) or spec.numel == 0:
            return f"its shape is {list(spec.shape)}; MLX quantizes matrices, one or a stack of them"
        if spec.shape[-1] % self.group_size:
            return f"its rows of {spec.shape[-1]} do not divide into groups of {self.group_size}; {setting(LEAVE)}"
        return None

    def scale_dtype(self, spec: TensorSpec) -> DType:
        """Return the dtype of scales and biases: that of the weights, float32 for float64."""
        return DTYPES["F32"] if spec.dtype.name == "F64" else spec.dtype

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        *rows, columns = spec.shape
        scales = StoredSpec(self.scale_dtype(spec), (*rows, columns // self.group_size))
        words = StoredSpec(DTYPES["U32"], (*rows, columns * self.bits // 32))
        return {"weight": words, SCALES: scales, BIASES: scales}

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        from loaders.quantization.kernels.mlx_device import MlxCoder

        spec, group, bits = view.spec, self.group_size, self.bits
        dtype = self.scale_dtype(spec).name

        def encode_range(start: int, stop: int) -> None:
            groups = (stop - start) // group
            if fits(work.kernels, MlxCoder):
                codes, *ends = work.kernels.mlx_codes(view.read(start, stop), spec.dtype.name, self.mode, bits, group)
                sink.write("weight", start * bits // 32, codes.view(np.uint32))
                for role, values in zip((SCALES, BIASES), ends, strict=True):
                    assert values is not None
                    sink.write(role, start // group, values.view(storage_of(DTYPES[dtype])))
                return
            packed = work.array("packed", (stop - start) * bits // 8, np.uint8)
            scales, biases = work.array("scales", groups, np.float32), work.array("biases", groups, np.float32)
            raw = view.read(start, stop)
            work.kernels.encode_affine(raw, spec.dtype.name, bits, group, packed, scales, biases)
            sink.write("weight", start * bits // 32, packed.view(np.uint32))
            sink.write(SCALES, start // group, casts.cast(scales, "F32", dtype))
            sink.write(BIASES, start // group, casts.cast(biases, "F32", dtype))

        work.sweep(spec.numel, group, encode_range)

    def range_align(self, spec: TensorSpec) -> int:
        return self.align(spec)

    def align(self, spec: TensorSpec) -> int:
        return self.group_size

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """One step, and the roundings of scale and bias to the weights' dtype, which are counted twice to be safe.

        With the greatest code n, |edge| is at least n / 2 of the first scale. So q >= (n + 1) / 2, and the range is at
        most n q / (q - 1/2) <= n + 1 of the scale that is stored: the far end is cut off by at most one step.
        """
        from loaders.quantization.kernels.compressed_tensors import fp4
        from loaders.quantization.kernels.cpu import kernel_input

        group, dtype, top = self.group_size, self.scale_dtype(spec).name, (1 << self.bits) - 1
        scale, bias = (
            float(fp4.largest(kernel_input(stored.read(role, start // group, -(-stop // group)), dtype)))
            for role in (SCALES, BIASES)
        )
        u = ROUNDING[dtype] + SMALL
        cast = 2**-7 * (bias + top * scale) + 2.0**-24 * (dtype == "F16")
        return scale * (1 + 2 * top * u) + 2 * bias * u + (top + 1) * LEAST[dtype] + cast

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels.mlx import affine

        packed, scales, biases = self._read(spec, stored, start, stop)
        affine.decode(packed, scales, biases, self.bits, self.group_size, out)

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels.cpu import kernel_input
        from loaders.quantization.kernels.mlx import affine

        packed, scales, biases = self._read(spec, stored, start, stop)
        affine.compare(kernel_input(block, source), packed, scales, biases, self.bits, self.group_size, sums)
        return True

    def parts_on_device(self, spec: TensorSpec, start: int, stop: int) -> Sequence[PartRange] | None:
        packed = "weight", start * self.bits // 32, stop * self.bits // 32
        return packed, *((role, start // self.group_size, stop // self.group_size) for role in (SCALES, BIASES))

    def decode_on_device(self, spec: TensorSpec, parts: Sequence[Any], count: int) -> Any:
        from loaders.quantization.kernels.device import decode

        packed, *others = parts
        scales, biases = (decode.floats(each, self.scale_dtype(spec).name) for each in others)
        return decode.affine(packed, self.bits, scales, biases)

    def _read(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the bytes of items [start, stop), and the raw scales and biases of their groups."""
        from loaders.quantization.kernels.cpu import kernel_input

        group, dtype = self.group_size, self.scale_dtype(spec).name
        words = stored.read("weight", start * self.bits // 32, stop * self.bits // 32)
        scales, biases = (
            kernel_input(stored.read(role, start // group, stop // group), dtype) for role in (SCALES, BIASES)
        )
        return words.view(np.uint8), scales, biases
