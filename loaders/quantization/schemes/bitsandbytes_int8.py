"""bitsandbytes' LLM.int8(): a matrix in int8 with a scale for each row, as transformers stores and loads it.

Stored, by role: weight, int8 (R, C); SCB, float32 (R,), the row's largest magnitude, which is 127 times the step;
weight_format, a uint8 scalar 0 (row-major). bitsandbytes rounds weights to float16 first, so that magnitudes from 65520
on cannot be stored. It finds columns of outliers in the activations at run time: nothing is stored of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from loaders.dtypes import DTYPES, WEIGHT_DTYPES
from loaders.errors import VerifyFailed
from loaders.quantization.boxes import ByBoxes, read_rows
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Block, PartRange, Sink, Stored, View, Work
from loaders.specs import StoredSpec, TensorSpec

SCALES, FORMAT = "SCB", "weight_format"


@dataclass(frozen=True, slots=True)
class LlmInt8(ByBoxes):
    """int8 with a scale for each row.

    A code is the nearest multiple of the step, and zero is one of them, so that but for roundings no weight's error
    exceeds the weight: that is `error_limit`, for every matrix. Without outliers the error is about a hundredth of it.
    """

    kind: ClassVar[str] = "int8"
    engine: ClassVar[str] = "bitsandbytes"
    backends: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    error_limit: ClassVar[float] = 1.001

    def refuses(self, spec: TensorSpec) -> str | None:
        if spec.dtype.name not in WEIGHT_DTYPES:
            return f"its dtype is {spec.dtype}; int8 takes {', '.join(WEIGHT_DTYPES)}"
        if len(spec.shape) != 2 or spec.numel == 0:
            return f"its shape is {list(spec.shape)}; int8 takes matrices, with a scale for each row"
        if not spec.name.endswith(".weight"):
            return "its name does not end in .weight, in whose place bitsandbytes looks for .SCB"
        return None

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        return {
            "weight": StoredSpec(DTYPES["I8"], spec.shape),
            SCALES: StoredSpec(DTYPES["F32"], (spec.shape[0],)),
            FORMAT: StoredSpec(DTYPES["U8"], (), b"\0"),
        }

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        spec, columns = view.spec, view.spec.shape[1]

        def encode_rows(start: int, stop: int) -> None:
            block = view.read(start, stop)
            codes = work.array("codes", stop - start, np.int8)
            absmax = work.array("absmax", (stop - start) // columns, np.float32)
            work.kernels.encode_int8(block, spec.dtype.name, columns, codes, absmax)
            if np.isinf(absmax).any():
                _check_range(spec, block, absmax, start // columns)
            sink.write("weight", start, codes)
            sink.write(SCALES, start // columns, absmax)

        work.sweep(spec.numel, columns, encode_rows)

    def range_align(self, spec: TensorSpec) -> int:
        return self.align(spec)

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """Half a step, 1/127 of the largest scale, and the roundings to float16 (2^-11, or 2^-25) and of a cast."""
        columns = spec.shape[1]
        scales = stored.read(SCALES, start // columns, -(-stop // columns))
        return float(np.abs(scales).max(initial=0)) * (0.5 / 127 + 2**-8 + 2**-10) + 2**-24

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels.bitsandbytes import int8
        from loaders.quantization.kernels.cpu import kernel_input

        columns = spec.shape[1]
        scales = stored.read(SCALES, start // columns, -(-stop // columns))
        codes = stored.read("weight", start, stop)
        int8.compare(kernel_input(block, source), codes, start % columns, columns, scales, sums)
        return True

    def parts_on_device(self, spec: TensorSpec, start: int, stop: int) -> Sequence[PartRange] | None:
        columns = spec.shape[1]
        if start % columns or stop % columns:
            return None
        return ("weight", start, stop), (SCALES, start // columns, stop // columns)

    def decode_on_device(self, spec: TensorSpec, parts: Sequence[Any], count: int) -> Any:
        from loaders.quantization.kernels.device import decode

        codes, scales = parts
        return decode.llm_int8(codes, decode.floats(scales, "F32"))

    def decode_box(
        self, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
    ) -> None:
        from loaders.quantization.kernels.read_only import fp8_int8

        scales = stored.read(SCALES, rows[0], rows[-1] + 1)[:: rows.step]
        codes = read_rows(stored, "weight", rows, spec.shape[1])[:, columns.start : columns.stop]
        fp8_int8.decode_int8(codes, scales, out)


def _check_range(spec: TensorSpec, block: Block, absmax: np.ndarray, first: int) -> None:
    """Raise VerifyFailed if a finite weight became infinite in float16. The gate judges weights that were infinite."""
    for row in np.flatnonzero(np.isinf(absmax)):
        values = casts.to_float32(block.reshape(absmax.size, -1)[row], spec.dtype.name)
        if np.isfinite(values).all():
            raise VerifyFailed(
                f"{spec.name}: row {first + row} holds a weight of magnitude {np.abs(values).max():g}, and LLM.int8"
                " rounds to float16 first, which ends at 65504; keep the tensor by a rule, or quantize it with nf4"
            )
