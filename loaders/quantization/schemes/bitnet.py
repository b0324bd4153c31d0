"""BitNet's ternary weights, two bits each, as transformers' `bitnet` quantizer loads them.

Stored, by role: weight, uint8 (R/4, C), see kernels/bitnet.py; weight_scale (1,), in the model's dtype. The scale has
two opposite meanings (transformers/integrations/bitnet.py): BitLinear divides its output by it, and so gets 1/mean|w|;
AutoBitLinear multiplies by it, and so gets mean|w|. The mean is that of the whole tensor, summed in float64 in a fixed
order and rounded to float32 once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal

import numpy as np

from loaders.dtypes import DTYPES, WEIGHT_DTYPES
from loaders.errors import LEAVE, VerifyFailed, setting
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Block, Sink, Stored, View, Work
from loaders.quantization.schemes.runs import codes_by_chunks
from loaders.specs import StoredSpec, TensorSpec

SMALLEST_MEAN = np.float32(1e-5)  # the clamp in transformers' WeightQuant, which keeps a tensor of zeros from 1 / 0


def total_magnitude(view: View, work: Work) -> float:
    """The sum of a whole tensor's magnitudes, in float64.

    It does not depend on the device, on threads, or on how ranges are cut: kernels sum fixed runs of weights in a fixed
    order, and the exact sum of these sums is rounded once.
    """
    from loaders.quantization.kernels import bitnet

    def sums(start: int, stop: int) -> list[float]:
        found: list[float] = work.kernels.magnitude_sums(view.read(start, stop), view.spec.dtype.name).tolist()
        return found

    return math.fsum(chain.from_iterable(work.sweep(view.spec.numel, bitnet.SUMMED, sums)))


def absmean(view: View, work: Work) -> np.float32:
    """Return the mean magnitude of a whole tensor, at least SMALLEST_MEAN.

    Raises:
        VerifyFailed: it holds NaN or infinities.
    """
    spec, total = view.spec, total_magnitude(view, work)
    if not math.isfinite(total):
        raise VerifyFailed(
            f"{spec.name}: it holds NaN or infinities, and its ternary scale, the mean of all magnitudes, would be"
            " one too; keep the tensor by a rule"
        )
    return max(np.float32(total / spec.numel), SMALLEST_MEAN)


@dataclass(frozen=True, slots=True)
class Ternary:
    """Weights of -1, 0 or 1 times one scale a tensor."""

    kind: ClassVar[str] = "ternary"
    engine: ClassVar[str] = "bitnet"
    backends: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps")
    error_limit: ClassVar[float] = 1.01  # |w - t * mean| <= |w| for every weight, but for the rounding of the scale
    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear"

    def refuses(self, spec: TensorSpec) -> str | None:
        if spec.dtype.name not in WEIGHT_DTYPES:
            return f"its dtype is {spec.dtype}; ternary takes {', '.join(WEIGHT_DTYPES)}"
        if len(spec.shape) != 2:
            return f"its shape is {list(spec.shape)}; ternary takes matrices"
        if spec.shape[0] % 4 or spec.numel == 0:
            return f"its {spec.shape[0]} rows are no multiple of 4, and a byte holds four rows; {setting(LEAVE)}"
        return None

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        rows, columns = spec.shape
        scale = DTYPES["F32"] if spec.dtype.name == "F64" else spec.dtype
        return {"weight": StoredSpec(DTYPES["U8"], (rows // 4, columns)), "weight_scale": StoredSpec(scale, (1,))}

    def state_bytes(self, spec: TensorSpec) -> int:
        return 0

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        spec, dtype = view.spec, view.spec.dtype.name
        mean = absmean(view, work)
        inverse = np.float32(1) / mean
        quarter = spec.numel // 4

        def pack(start: int, stop: int) -> None:
            a, b, c, d = (view.read(k * quarter + start, k * quarter + stop, slot=k) for k in range(4))
            packed = work.array("packed", stop - start, np.uint8)
            work.kernels.pack_ternary((a, b, c, d), dtype, float(inverse), packed)
            sink.write("weight", start, packed)

        work.sweep(quarter, 1, pack)
        scale = np.array([inverse if self.linear_class == "bitlinear" else mean], np.float32)
        sink.write("weight_scale", 0, casts.cast(scale, "F32", self.stored(spec)["weight_scale"].dtype.name))

    def align(self, spec: TensorSpec) -> int:
        return 1

    def _factor(self, spec: TensorSpec, stored: Stored) -> np.float32:
        """Return what the stored scale multiplies codes by."""
        dtype = self.stored(spec)["weight_scale"].dtype.name
        scale = casts.to_float32(stored.read("weight_scale", 0, 1), dtype)[0]
        return np.float32(np.float32(1) / scale if self.linear_class == "bitlinear" else scale)

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels import bitnet
        from loaders.quantization.kernels.cpu import kernel_input

        x, scale = kernel_input(block, source), self._factor(spec, stored)
        for at, end, codes, shift in codes_by_chunks(stored, "weight", spec.numel // 4, (0, 2, 4, 6), start, stop):
            bitnet.compare(x[at - start : end - start], codes, np.uint8(shift), scale, sums)
        return True

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels import bitnet

        scale, quarter = self._factor(spec, stored), spec.numel // 4
        for k in range(start // quarter, -(-stop // quarter)):
            first, last = max(start, k * quarter), min(stop, (k + 1) * quarter)
            codes = stored.read("weight", first - k * quarter, last - k * quarter)
            bitnet.unpack(codes, np.uint8(2 * k), scale, out[first - start : last - start])
