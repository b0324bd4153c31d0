"""compressed-tensors' formats of eight bits with a scale a row: FP8_DYNAMIC (float-quantized), W8A8 (int-quantized).

Shapes: R rows, C columns. By role:
    weight         F8_E4M3 or int8 (R, C)
    weight_scale   (R, 1), in the weights' dtype
The engine quantizes activations as it runs, a token at a time. Bytes are those of compressed-tensors 0.20 and of
llm-compressor's model_free_ptq; see kernels/compressed_tensors/fp8.py and int8.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from loaders.dtypes import DTYPES
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Block, PartRange, Sink, Stored, View, Work
from loaders.quantization.schemes.compressed_tensors_int import (
    E4M3_STEPS,
    EPS,
    UNDERFLOW,
    packed_steps,
    refuses_matrix,
    scale_dtype,
)
from loaders.specs import StoredSpec, TensorSpec


@dataclass(frozen=True, slots=True)
class RowScaled:
    """Weights of eight bits, "float" (E4M3) or "int", with a scale a row.

    `whole` is for checkpoints with one scale for the whole tensor, which are read and never written.
    """

    kind: ClassVar[str] = "row_scaled"
    engine: ClassVar[str] = "compressed-tensors"
    backends: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    type: Literal["float", "int"]
    whole: bool = False

    @property
    def error_limit(self) -> float:
        """The rounding of E4M3; for integers, the weights themselves.

        E4M3 rounds by a sixteenth of a weight, or by 2^-10 scales, which is negligible beside a row's largest of 448
        scales in any row below 10^8 weights; the rest is for bfloat16's roundings of quotient and scale. An integer
        weight is off by no more than itself, and in a long row all but the largest may round to zero.
        """
        return 0.08 if self.type == "float" else 1.01

    def refuses(self, spec: TensorSpec) -> str | None:
        return refuses_matrix(spec, "FP8_DYNAMIC" if self.type == "float" else "W8A8")

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        codes = DTYPES["F8_E4M3" if self.type == "float" else "I8"]
        return {
            "weight": StoredSpec(codes, spec.shape),
            "weight_scale": StoredSpec(scale_dtype(spec.dtype), (1,) if self.whole else (spec.shape[0], 1)),
        }

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        assert not self.whole
        spec, columns, dtype = view.spec, view.spec.shape[1], scale_dtype(view.spec.dtype).name

        def encode_range(start: int, stop: int) -> None:
            x = view.read(start, stop)
            codes = work.array("codes", stop - start, np.uint8)
            scales = work.array("scales", (stop - start) // columns, np.float32)
            work.kernels.encode_scaled_rows(x, spec.dtype.name, self.type, columns, EPS[dtype], codes, scales)
            sink.write("weight", start, codes)
            sink.write("weight_scale", start // columns, casts.cast(scales, "F32", dtype))

        work.sweep(spec.numel, columns, encode_range)

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """The largest scale times E4M3_STEPS for E4M3, or times those of `packed_steps` for integers."""
        columns, dtype = spec.shape[1], scale_dtype(spec.dtype).name
        first, last = (0, 1) if self.whole else (start // columns, -(-stop // columns))
        scale = float(np.abs(casts.to_float32(stored.read("weight_scale", first, last), dtype)).max(initial=0))
        steps, top = (E4M3_STEPS, 448.0) if self.type == "float" else packed_steps(8)
        return scale * steps + top * UNDERFLOW

    def range_align(self, spec: TensorSpec) -> int:
        return self.align(spec)

    def align(self, spec: TensorSpec) -> int:
        return spec.shape[1]

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels.compressed_tensors import fp8, int8

        columns, scales = spec.shape[1], self._scales(spec, stored, start, stop)
        decode_rows = fp8.decode_rows if self.type == "float" else int8.decode_rows
        decode_rows(stored.read("weight", start, stop), columns, scales, out)

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels.compressed_tensors import fp8, int8
        from loaders.quantization.kernels.cpu import kernel_input

        x, columns, scales = kernel_input(block, source), spec.shape[1], self._scales(spec, stored, start, stop)
        compare_rows = fp8.compare_rows if self.type == "float" else int8.compare_rows
        compare_rows(x, stored.read("weight", start, stop), columns, scales, sums)
        return True

    def parts_on_device(self, spec: TensorSpec, start: int, stop: int) -> Sequence[PartRange] | None:
        columns = spec.shape[1]
        return None if self.whole else (("weight", start, stop), ("weight_scale", start // columns, stop // columns))

    def decode_on_device(self, spec: TensorSpec, parts: Sequence[Any], count: int) -> Any:
        from loaders.quantization.kernels.device import decode

        codes, scales = parts
        decode_rows = decode.e4m3_rows if self.type == "float" else decode.int8_rows
        return decode_rows(codes, decode.floats(scales, scale_dtype(spec.dtype).name))

    def _scales(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Return the raw scales of the rows in items [start, stop)."""
        from loaders.quantization.kernels.cpu import kernel_input

        columns, dtype = spec.shape[1], scale_dtype(spec.dtype).name
        first, last = (0, 1) if self.whole else (start // columns, stop // columns)
        scales = kernel_input(stored.read("weight_scale", first, last), dtype)
        return np.full((stop - start) // columns, scales[0]) if self.whole else scales
