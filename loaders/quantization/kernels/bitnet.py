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
from loaders.quantization.kernels.compare import CHUNK, Group, add_groups, add_slowly, float_at, settle
from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, kernel, vector

STEP = 32  # columns packed at once
LANES = 16
RUN = 512  # weights that one call of `_run_sum` adds up, in registers
RUNS = 128
SUMMED = RUN * RUNS  # weights of one sum
F64 = ir.DoubleType()


@vector(types.float64)
def _run_sum(lanes: Lanes, x: Array, start: Value) -> Value:
    """Return the sum of RUN magnitudes from `start` on, in float64: see `magnitude_sums`."""

    def added(first: int, step: int) -> Value:
        """Every step-th vector from the first on: depth first, so that few sums wait for their partners."""
        if step * LANES == RUN:
            magnitudes = lanes.absolute(lanes.floats(x, lanes.op("add", start, first * LANES), LANES))
            return lanes.b.fpext(magnitudes, ir.VectorType(F64, LANES))
        return lanes.b.fadd(added(first, 2 * step), added(first + step, 2 * step))

    wide = added(0, 1)
    while (width := wide.type.count // 2) > 0:
        wide = lanes.b.fadd(lanes.part(wide, 0, width), lanes.part(wide, 1, width))
    return lanes.b.extract_element(wide, ir.Constant(I32, 0))


@kernel
def magnitude_sums(x, sums):  # type: ignore[no-untyped-def]
    """Write the sums of |x| over SUMMED weights each, the last filled up with zeros, into float64 `sums`.

    The order of additions is fixed, and such that a GPU can keep to it: the second half is added onto the first until
    one number is left, first for the RUN weights of a run, then for the sums of RUNS runs.
    """
    runs = np.empty(RUNS, np.float64)
    for index in range(sums.size):
        runs[:] = 0.0
        start, stop = index * SUMMED, min((index + 1) * SUMMED, x.size)
        whole = (stop - start) // RUN
        for run in range(whole):
            runs[run] = _run_sum(x, start + run * RUN)
        if start + whole * RUN < stop:
            filled = np.zeros(RUN, np.float32)
            for at in range(start + whole * RUN, stop):
                filled[at - start - whole * RUN] = float_at(x, at)
            runs[whole] = _run_sum(filled, 0)
        width = RUNS // 2
        while width > 0:
            for run in range(width):
                runs[run] += runs[run + width]
            width //= 2
        sums[index] = runs[0]


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
    with np.errstate(over="ignore"):  # an infinite product is above the limit, as it should be
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


@vector(types.float64)
def _add(
    lanes: Lanes, x: Array, packed: Array, shift: Value, scale: Value, start: Value, stop: Value, totals: Array
) -> Value:
    """Sum the differences of weights [start, stop), a multiple of LANES, and their codes: see `compare.add_groups`."""
    wide, factor = ir.VectorType(I32, LANES), lanes.splat(scale, LANES)
    by = lanes.splat(lanes.b.zext(shift, I32), LANES)

    def decoded(at: Value, _: Group) -> list[Value]:
        codes = lanes.b.lshr(lanes.b.zext(lanes.load(packed, at, LANES), wide), by)
        trits = lanes.op("sub", lanes.op("and_", codes, 3), 1)
        return [lanes.b.fmul(lanes.b.sitofp(trits, factor.type), factor)]

    every = ir.Constant(start.type, LANES)
    return add_groups(lanes, x, start, stop, every, totals, lambda g: (), decoded, in_order=LANES)


@kernel
def compare(x, packed, shift, scale, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x, (n,) raw weights, and what `unpack` makes of the rest to `sums`: see compare.py."""
    totals = np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        whole = start + (stop - start) // LANES * LANES
        if not settle(_add(x, packed, shift, scale, start, whole, totals), totals, sums):
            whole = start
        if whole < stop:
            decoded = np.empty(stop - whole, np.float32)
            unpack(packed[whole:stop], shift, scale, decoded)
            add_slowly(x[whole:stop], decoded, 0, stop - whole, sums)
