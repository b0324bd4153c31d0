"""The scheme that does not quantize: weights are copied, or cast to another float dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from loaders.dtypes import DTYPES, WEIGHT_DTYPES, storage_of
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Block, Sink, Stored, View, Work
from loaders.specs import StoredSpec, TensorSpec


@dataclass(frozen=True, slots=True)
class Plain:
    """A copy; with `dtype` ("BF16", "F16", "F32") float weights are rounded to it, nearest even."""

    kind: ClassVar[str] = "none"
    engine: ClassVar[str] = "plain"
    backends: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps", "mlx")
    dtype: str | None = None

    @property
    def error_limit(self) -> float:
        """Twice the greatest relative rounding of a cast to the dtype; 0 for a copy."""
        return {"BF16": 2**-8, "F16": 2**-10, "F32": 2**-23, None: 0.0}[self.dtype]

    def refuses(self, spec: TensorSpec) -> str | None:
        if self.dtype is not None and spec.dtype.name not in WEIGHT_DTYPES and spec.dtype.block == 1:
            return f"its dtype is {spec.dtype}, which is not cast; {', '.join(WEIGHT_DTYPES)} are"
        return None

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        dtype = spec.dtype if self.dtype is None else DTYPES[self.dtype]
        return {"weight": StoredSpec(dtype, spec.shape)}

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        dtype = view.spec.dtype.name if self.dtype is None else self.dtype

        def copy(start: int, stop: int) -> None:
            block = view.read(start, stop)
            if dtype != view.spec.dtype.name:
                out = work.array("cast", stop - start, storage_of(DTYPES[dtype]))
                block = casts.cast(block, view.spec.dtype.name, dtype, out)
            sink.write("weight", start, block)

        work.sweep(view.spec.num_items, 1, copy)

    def range_align(self, spec: TensorSpec) -> int:
        return self.align(spec)

    def align(self, spec: TensorSpec) -> int:
        # Items of block formats are bytes; ranges of whole blocks can be decoded.
        return spec.dtype.size((spec.dtype.block,)) if spec.dtype.block > 1 else 1

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels import compare, cpu

        dtype = spec.dtype.name if self.dtype is None else self.dtype
        decoded = cpu.kernel_input(stored.read("weight", start, stop), dtype)
        compare.compare(cpu.kernel_input(block, source), decoded, sums)
        return True

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        dtype = spec.dtype.name if self.dtype is None else self.dtype
        out[:] = casts.to_float32(stored.read("weight", start, stop), dtype)
