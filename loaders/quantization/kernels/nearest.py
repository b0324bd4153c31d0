"""A check that decoded weights are the nearest values that their groups' stored scales allow."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.compare import float_at
from loaders.quantization.kernels.lanes import I32, Array, Lanes, Value, kernel, vector

LANES = 16  # weights checked at once


def is_far(lanes: Lanes, source: Value, decoded: Value, low: Value, high: Value, half: Value, slope: Value) -> Value:
    """Return where |clip(source, low, high) - decoded| > half + slope * |decoded|.

    A pair with a NaN never counts: comparisons are ordered, and `larger` replaces a NaN weight by the low end.
    """
    source = lanes.larger(low, source)
    source = lanes.b.select(lanes.b.fcmp_ordered("<", high, source), high, source)
    allowed = lanes.b.fadd(half, lanes.b.fmul(slope, lanes.absolute(decoded)))
    return lanes.b.fcmp_ordered(">", lanes.absolute(lanes.b.fsub(source, decoded)), allowed)


class Symmetric:
    """The same with bounds by a group's |scale| and `grid.symmetric_terms`: an LLVM array of four float32."""

    def __init__(self, lanes: Lanes, terms: Value) -> None:
        self._lanes = lanes
        self._top, self._half, self._floor, self._slope = (
            lanes.splat(lanes.b.extract_value(terms, index), LANES) for index in range(4)
        )

    def bounds(self, size: Value) -> tuple[Value, Value]:
        """Return the greatest value and half a gap for a |scale| in every lane."""
        half = self._lanes.b.fmul(size, self._half)
        return self._lanes.b.fmul(size, self._top), self._lanes.b.fadd(half, self._floor)

    def is_far(self, source: Value, decoded: Value, bounds: tuple[Value, ...]) -> Value:
        high, half = bounds
        return is_far(self._lanes, source, decoded, self._lanes.b.fneg(high), high, half, self._slope)


@vector(types.int32)
def _is_off(
    lanes: Lanes, x: Array, y: Array, group: Value, low: Array, high: Array, half: Array, slope: Value, count: Value
) -> Value:
    """Return 1 if any pair in `count` groups, of a multiple of LANES, is further apart than allowed, else 0."""
    growth = lanes.splat(slope, LANES)

    def add_group(g: Value, found: Value) -> list[Value]:
        ends = [
            lanes.splat(lanes.b.load(lanes.b.gep(each.data, [g])), LANES) for each in (low, high, half)
        ]  # fmt: skip

        def add(at: Value, found: Value) -> list[Value]:
            source, decoded = lanes.floats(x, at, LANES), lanes.floats(y, at, LANES)
            is_off = is_far(lanes, source, decoded, ends[0], ends[1], ends[2], growth)
            return [lanes.b.or_(found, lanes.b.sext(is_off, found.type))]

        start = lanes.b.mul(g, group)
        return lanes.fold(start, lanes.b.add(start, group), LANES, [found], add)

    nothing = lanes.const(ir.VectorType(I32, LANES), 0)
    [found] = lanes.fold(ir.Constant(count.type, 0), count, 1, [nothing], add_group)
    return lanes.op("and_", lanes.reduce("or", found), 1)


@kernel
def is_off(x, y, group, low, high, half, slope):  # type: ignore[no-untyped-def]
    """Whether any pair has |clip(x, low, high) - y| > half + slope * |y|.

    x: (n,) raw weights, n = low.size * group; y: float32 (n,); low, high, half: float32, one entry for each group.
    """
    if group % LANES == 0:
        return _is_off(x, y, group, low, high, half, slope, low.size) != 0
    found = False
    for g in range(low.size):
        for at in range(g * group, (g + 1) * group):
            error = abs(min(max(float_at(x, at), low[g]), high[g]) - y[at])
            found |= error > half[g] + slope * abs(y[at])
    return found


def _is_off_symmetric(lanes: Lanes, x: Array, y: Array, group: int, scales: Array, terms: Value, count: Value) -> Value:
    """Return 1 if any pair in `count` groups is further apart than its group's scale allows, else 0."""
    symmetric = Symmetric(lanes, terms)

    def add_group(g: Value, found: Value) -> list[Value]:
        bounds = symmetric.bounds(lanes.absolute(lanes.splat(lanes.b.load(lanes.b.gep(scales.data, [g])), LANES)))
        start = lanes.op("mul", g, group)
        for part in range(group // LANES):
            at = lanes.op("add", start, LANES * part)
            source, decoded = lanes.floats(x, at, LANES), lanes.floats(y, at, LANES)
            found = lanes.b.or_(found, symmetric.is_far(source, decoded, bounds))
        return [found]

    nothing = lanes.const(ir.VectorType(ir.IntType(1), LANES), 0)
    [found] = lanes.fold(ir.Constant(count.type, 0), count, 1, [nothing], add_group)
    return lanes.b.zext(lanes.reduce("or", found), I32)


@vector(types.int32)
def _is_off_16(lanes: Lanes, x: Array, y: Array, scales: Array, terms: Value, count: Value) -> Value:
    return _is_off_symmetric(lanes, x, y, 16, scales, terms, count)


@vector(types.int32)
def _is_off_32(lanes: Lanes, x: Array, y: Array, scales: Array, terms: Value, count: Value) -> Value:
    return _is_off_symmetric(lanes, x, y, 32, scales, terms, count)


@kernel
def is_off_symmetric(x, y, group, scales, terms):  # type: ignore[no-untyped-def]
    """Whether any pair has |clip(x, -s * top, s * top) - y| > s * half + floor + slope * |y|, s its group's |scale|.

    x: (n,) raw weights, n = scales.size * group, group 16 or 32; y: float32 (n,); scales: float32; terms: top, half,
    floor and slope, four float32.
    """
    if group == 16:
        return _is_off_16(x, y, scales, terms, scales.size) != 0
    return _is_off_32(x, y, scales, terms, scales.size) != 0
