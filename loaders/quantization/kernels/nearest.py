"""Whether decoded weights are the nearest that their groups' stored scales could give."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.compare import float_at
from loaders.quantization.kernels.lanes import I32, Array, Lanes, Value, kernel, vector

LANES = 16


@vector(types.int32)
def _is_off(
    lanes: Lanes,
    x: Array,
    y: Array,
    start: Value,
    stop: Value,
    low: Value,
    high: Value,
    half: Value,
    slope: Value,
) -> Value:
    """1 where a pair of [start, stop), a multiple of LANES, is further apart than allowed, else 0; NaN is not off."""
    ends = [lanes.splat(end, LANES) for end in (low, high, half, slope)]

    def add(at: Value, found: Value) -> list[Value]:
        source, decoded = lanes.floats(x, at, LANES), lanes.floats(y, at, LANES)
        source = lanes.larger(ends[0], source)
        source = lanes.b.select(lanes.b.fcmp_ordered("<", ends[1], source), ends[1], source)
        allowed = lanes.b.fadd(ends[2], lanes.b.fmul(ends[3], lanes.absolute(decoded)))
        is_off = lanes.b.fcmp_ordered(">", lanes.absolute(lanes.b.fsub(source, decoded)), allowed)
        return [lanes.b.or_(found, lanes.b.sext(is_off, found.type))]

    [found] = lanes.fold(start, stop, LANES, [lanes.const(ir.VectorType(I32, LANES), 0)], add)
    return lanes.op("and_", lanes.reduce("or", found), 1)


@kernel
def count_off(x, y, group, low, high, half, slope):  # type: ignore[no-untyped-def]
    """How many groups hold a pair with |clip(x, low, high) - y| > half + slope |y|.

    x: (n,) raw weights, n = low.size * group; y: float32 (n,); low, high, half: float32, one of each group.
    """
    count = 0
    for g in range(low.size):
        start, stop = g * group, (g + 1) * group
        whole = start + group // LANES * LANES
        found = _is_off(x, y, start, whole, low[g], high[g], half[g], slope)
        for at in range(whole, stop):
            error = abs(min(max(float_at(x, at), low[g]), high[g]) - y[at])
            found |= error > half[g] + slope * abs(y[at])
        count += found
    return count
