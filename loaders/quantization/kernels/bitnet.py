"""Ternary weights by the mean magnitude, as BitNet checkpoints of transformers store them.

t = clamp(round(w * fl(1 / max(mean|w|, 1e-5))), -1, 1) in float32. Row r of R is stored as t + 1 in byte row
r mod (R/4), in the two bits from 2 * (r div (R/4)) on. Since the product rises with |w| and halves round to even, t is
zero exactly where |w| is at most some bound. `zero_limit` finds it among the dtype's own bit patterns, so that packing
compares integers and multiplies nothing.

BitNet b1.58: Ma et al. 2024, arXiv:2402.17764; bytes: transformers/integrations/bitnet.py (WeightQuant, pack_weights).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.casts import to_float32
from loaders.quantization.kernels.compare import float_at
from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, kernel, vector

STEP = 32  # columns packed at once
LANES = 16  # float64 sums side by side
F64 = ir.DoubleType()


@vector(types.void)
def _add_magnitudes(lanes: Lanes, x: Array, at: Value, sums: Array) -> None:
    """Add LANES magnitudes to LANES float64 sums."""
    zero = ir.Constant(at.type, 0)
    magnitudes = lanes.absolute(lanes.floats(x, at, LANES))
    wide = lanes.b.fpext(magnitudes, ir.VectorType(F64, LANES))
    lanes.store(lanes.b.fadd(lanes.load(sums, zero, LANES), wide), sums, zero)


@kernel
def magnitude_sum(x):  # type: ignore[no-untyped-def]
    """Return the sum of |x| in float64, in a fixed order; it is NaN or infinite if a weight is."""
    sums = np.zeros(LANES, np.float64)
    whole = x.size // LANES * LANES
    for at in range(0, whole, LANES):
        _add_magnitudes(x, at, sums)
    total = 0.0
    for lane in range(LANES):
        total += sums[lane]
    for at in range(whole, x.size):
        total += abs(np.float64(float_at(x, at)))
    return total


def zero_limit(dtype: str, inverse: np.float32) -> tuple[int, np.float32]:
    """Find the greatest magnitude m of `dtype` with fl(m * inverse) <= 0.5, by bisection; return its bits and its
    value.

    Bit patterns of magnitudes sort as their values do, and 0.5 itself rounds to 0, the even neighbour.
    """
    bits_type, infinity = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}[
        dtype
    ]
    storage = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[dtype]

    def value(bits: int) -> np.float32:
        return np.float32(to_float32(np.array([bits], bits_type).view(storage), dtype)[0])

    low, high = 0, infinity
    with np.errstate(over="ignore"):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if value(middle) * inverse <= np.float32(0.5) else (low, middle)
    return low, value(low)


@vector(types.void)
def _pack_step(lanes: Lanes, a: Array, b: Array, c: Array, d: Array, at: Value, limit: Value, out: Array) -> None:
    """Pack STEP columns of four runs of weights into STEP bytes.

    Each weight gives the two bits 1 where its magnitude is within the limit, else 0 below zero and 2 above.
    """
    is_wide = a.element is F32
    kind = ir.VectorType(I32 if is_wide else a.element, STEP)
    bound = lanes.splat(limit if is_wide else lanes.b.trunc(limit, a.element), STEP)
    packed = lanes.const(kind, 0)
    for quarter, run in enumerate((a, b, c, d)):
        bits = lanes.b.bitcast(lanes.load(run, at, STEP), kind)
        is_zero = lanes.b.icmp_unsigned("<=", lanes.op("and_", bits, 0x7FFFFFFF if is_wide else 0x7FFF), bound)
        is_negative = lanes.b.icmp_signed("<", bits, lanes.const(kind, 0))
        signed = lanes.b.select(is_negative, lanes.const(kind, 0), lanes.const(kind, 2 << 2 * quarter))
        packed = lanes.b.or_(packed, lanes.b.select(is_zero, lanes.const(kind, 1 << 2 * quarter), signed))
    lanes.store(lanes.b.trunc(packed, ir.VectorType(I8, STEP)), out, at)


@kernel
def _pack_slowly(x, shift, start, bound, out):  # type: ignore[no-untyped-def]
    """Pack the columns of one run that are too few for a step."""
    for at in range(start, x.size):
        value = float_at(x, at)
        code = np.uint8(1)
        if not abs(value) <= bound:
            code = np.uint8(0) if value < 0 else np.uint8(2)
        out[at] |= code << np.uint8(shift)


@kernel
def pack(a, b, c, d, limit, bound, out):  # type: ignore[no-untyped-def]
    """Pack four runs of finite weights, (n,) each, into out, uint8 (n,); the first run takes the lowest bits.

    Magnitudes up to `bound`, whose bits are `limit`, become zero.
    """
    whole = out.size // STEP * STEP
    for at in range(0, whole, STEP):
        _pack_step(a, b, c, d, at, np.uint32(limit), out)
    out[whole:] = 0
    _pack_slowly(a, 0, whole, bound, out)
    _pack_slowly(b, 2, whole, bound, out)
    _pack_slowly(c, 4, whole, bound, out)
    _pack_slowly(d, 6, whole, bound, out)


@kernel
def unpack(packed, shift, scale, out):  # type: ignore[no-untyped-def]
    """Return (code - 1) * scale for the code at bit `shift` of each byte. packed: uint8 (n,); out: float32 (n,)."""
    table = np.array([-1.0, 0.0, 1.0, 2.0], np.float32) * np.float32(scale)
    for i in range(packed.size):
        out[i] = table[(packed[i] >> shift) & 3]
