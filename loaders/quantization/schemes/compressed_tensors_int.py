"""compressed-tensors' pack-quantized format: integer codes by group, packed into int32 words (W4A16, W8A16).

Shapes: R rows, C columns, G groups a row; C = G * group_size. By role:
    weight_packed       int32 (R, C * bits / 32)   codes plus 2^(bits-1), the first column in the lowest bits
    weight_scale        (R, G), in the weights' dtype
    weight_zero_point   int32 (ceil(R / 8), G)     only asymmetric: zeros plus 8, eight rows to a word
    weight_shape        int64 (2,)                 R, C
Bytes are those of compressed-tensors 0.20 (compressors/pack_quantized/base.py) and of llm-compressor's model_free_ptq;
see kernels/compressed_tensors/packed_int.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loaders.dtypes import DTYPES, WEIGHT_DTYPES, DType
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Block, PartRange, Sink, Stored, View, Work
from loaders.specs import StoredSpec, TensorSpec

GROUP_SIZES = (32, 64, 128)
# torch.finfo(dtype).eps, which calculate_qparams in compressed_tensors puts in the place of a scale of zero
EPS = {"BF16": np.float32(2**-7), "F16": np.float32(2**-10), "F32": np.float32(2**-23)}


def scale_dtype(dtype: DType) -> DType:
    """Return the dtype in which scales are computed and stored: the weights' own, float32 for float64."""
    return DTYPES["F32"] if dtype.name == "F64" else dtype


def refuses_matrix(spec: TensorSpec, scheme: str) -> str | None:
    """Say why a tensor cannot be the weights of a linear layer, or return None."""
    if spec.dtype.name not in WEIGHT_DTYPES:
        return f"its dtype is {spec.dtype}; {scheme} takes {', '.join(WEIGHT_DTYPES)}"
    if len(spec.shape) != 2 or spec.numel == 0:
        return f"its shape is {list(spec.shape)}; {scheme} takes matrices; keep it by a rule"
    return None


def is_ragged(spec: TensorSpec, group: int) -> bool:
    """Whether a tensor could be the weights of a linear layer, but for rows that groups do not divide."""
    return refuses_matrix(spec, "") is None and spec.shape[1] % group != 0


# By how many scales a weight in E4M3 may be off: half of the widest gap, which is 32, and 4 for the roundings of
# quotient, scale and cast.
E4M3_STEPS = 20.0
UNDERFLOW = 2.0**-24  # by how much a float16 scale may be off where it is not a normal number


def packed_steps(bits: int) -> tuple[float, float]:
    """Return by how many scales a weight may be off, and how many scales the largest is: see `PackedInt.error_limit`.

    A cast from a wider dtype, which moves a weight by 2^-9 of itself, is allowed for.
    """
    top, step = (8.0, 0.62) if bits == 4 else (128.0, 1.05)
    return step * 1.05 + top * 2**-8, top


@dataclass(frozen=True, slots=True)
class PackedInt:
    """Integer codes of four or eight bits. Checkpoints with a scale a row are read as groups of whole rows."""

    kind: ClassVar[str] = "packed_int"
    engine: ClassVar[str] = "compressed-tensors"
    backends: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    group_sizes: ClassVar[tuple[int, ...]] = GROUP_SIZES
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    @property
    def error_limit(self) -> float:
        """The error of the worst groups: one weight of full size, and all others just rounding to zero.

        A weight w is off by at most `step` scales, and by at most |w|, since zero is a code. So the sum of the others'
        squared errors is at most that of their squares, and the worst is where both are at their bounds. Of `step`,
        half a scale is for rounding to codes; the rest is for quotients rounded to bfloat16, for the top code (7 rather
        than 7.5) and for rounded zeros.
        """
        top, step = (7.5, 0.62) if self.bits == 4 else (127.5, 1.05)
        others = (self.group_size - 1) * step**2
        return math.sqrt((others + step**2) / (top**2 + others)) * 1.01

    def refuses(self, spec: TensorSpec) -> str | None:
        name = f"W{self.bits}A16"
        refusal = refuses_matrix(spec, name)
        if refusal is None and spec.shape[1] % self.group_size:
            return f"its {spec.shape[1]} columns do not divide into groups of {self.group_size}"
        return refusal

    def is_ragged(self, spec: TensorSpec) -> bool:
        return is_ragged(spec, self.group_size)

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        rows, columns = spec.shape
        groups = columns // self.group_size
        roles = {
            "weight_packed": StoredSpec(DTYPES["I32"], (rows, -(-columns * self.bits // 32))),
            "weight_scale": StoredSpec(scale_dtype(spec.dtype), (rows, groups)),
            "weight_shape": StoredSpec(DTYPES["I64"], (2,), np.array([rows, columns], "<i8").tobytes()),
        }
        if not self.symmetric:
            roles["weight_zero_point"] = StoredSpec(DTYPES["I32"], (-(-rows * self.bits // 32), groups))
        return roles

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        from loaders.quantization.kernels.compressed_tensors import packed_int

        spec, group, dtype = view.spec, self.group_size, scale_dtype(view.spec.dtype).name
        groups = spec.shape[1] // group

        def encode_range(start: int, stop: int) -> None:
            x, kernels = view.read(start, stop), work.kernels
            packed = work.array("packed", (stop - start) * self.bits // 8, np.uint8)
            scales = work.array("scales", (stop - start) // group, np.float32)
            if self.symmetric:
                kernels.encode_packed(x, spec.dtype.name, group, self.bits, EPS[dtype], packed, scales)
            else:
                zeros = work.array("zeros", scales.size, np.int8)
                kernels.encode_packed_zero(x, spec.dtype.name, group, EPS[dtype], packed, scales, zeros)
                words = packed_int.pack_zeros(zeros.reshape(-1, groups))
                sink.write("weight_zero_point", -(-(start // spec.shape[1]) // 8) * groups, words.view(np.int32))
            sink.write("weight_packed", start * self.bits // 32, packed.view(np.int32))
            sink.write("weight_scale", start // group, casts.cast(scales, "F32", dtype))

        work.sweep(spec.numel, self.align(spec), encode_range)

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """The steps of `packed_steps` times the largest scale; with zero points the range is twice as long."""
        raw = stored.read("weight_scale", start // self.group_size, -(-stop // self.group_size))
        steps, top = packed_steps(self.bits)
        scale = float(np.abs(casts.to_float32(raw, scale_dtype(spec.dtype).name)).max(initial=0))
        return scale * (steps if self.symmetric else steps + top * 2**-8) + 2 * top * UNDERFLOW

    def range_align(self, spec: TensorSpec) -> int:
        return self.align(spec)

    def align(self, spec: TensorSpec) -> int:
        """Return the items of a group; of a row where rows are no whole words; of eight rows with zero points.

        Rows that are no whole words occur only in checkpoints that are read. A word of zero points holds eight rows.
        """
        columns = spec.shape[1]
        if not self.symmetric:
            return 8 * columns
        return self.group_size if columns * self.bits % 32 == 0 else columns

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels import rounding
        from loaders.quantization.kernels.compressed_tensors import packed_int

        columns, group = spec.shape[1], self.group_size
        groups, row_words = columns // group, -(-columns * self.bits // 32)
        scales, shifts = self._scales_and_shifts(spec, stored, start, stop)
        if group % rounding.STEP == 0:
            packed = stored.read("weight_packed", start * self.bits // 32, stop * self.bits // 32).view(np.uint8)
            packed_int.decode(packed, group, self.bits, scales, shifts, out)
        else:
            packed = stored.read("weight_packed", start // columns * row_words, stop // columns * row_words)
            scales, shape = casts.to_float32(scales, scale_dtype(spec.dtype).name), (-1, groups)
            packed_int.decode_any(
                packed.view(np.uint8), self.bits, columns, group, scales.reshape(shape), shifts.reshape(shape), out
            )

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels.compressed_tensors import packed_int
        from loaders.quantization.kernels.cpu import kernel_input

        scales, shifts = self._scales_and_shifts(spec, stored, start, stop)
        packed = stored.read("weight_packed", start * self.bits // 32, stop * self.bits // 32).view(np.uint8)
        packed_int.compare(kernel_input(block, source), packed, self.group_size, self.bits, scales, shifts, sums)
        return True

    def parts_on_device(self, spec: TensorSpec, start: int, stop: int) -> Sequence[PartRange] | None:
        columns, group = spec.shape[1], self.group_size
        if columns * self.bits % 32:
            return None
        packed = "weight_packed", start * self.bits // 32, stop * self.bits // 32
        scales = "weight_scale", start // group, stop // group
        if self.symmetric:
            return packed, scales
        first, last, groups = start // columns, stop // columns, columns // group
        return packed, scales, ("weight_zero_point", first // 8 * groups, -(-last // 8) * groups)

    def decode_on_device(self, spec: TensorSpec, parts: Sequence[Any], count: int) -> Any:
        from loaders.quantization.kernels.device import decode

        packed, raw_scales, *words = parts
        scales, columns = decode.floats(raw_scales, scale_dtype(spec.dtype).name), spec.shape[1]
        if not words:
            return decode.packed_int(packed, self.bits, scales, 1 << (self.bits - 1))
        zeros = decode.zero_points(words[0], count // columns, columns // self.group_size)
        return decode.packed_int(packed, self.bits, scales, zeros)

    def _scales_and_shifts(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the raw scales of the groups in items [start, stop), and what their stored codes are shifted by."""
        from loaders.quantization.kernels.compressed_tensors import packed_int
        from loaders.quantization.kernels.cpu import kernel_input

        columns, group = spec.shape[1], self.group_size
        scales = kernel_input(stored.read("weight_scale", start // group, stop // group), scale_dtype(spec.dtype).name)
        if self.symmetric:
            return scales, np.full(scales.size, 1 << (self.bits - 1), np.float32)
        rows, first, groups = (stop - start) // columns, start // columns, columns // group
        words = stored.read("weight_zero_point", first // 8 * groups, -(-(first + rows) // 8) * groups)
        return scales, packed_int.unpack_zeros(words.view(np.uint32).reshape(-1, groups), rows).reshape(-1)
