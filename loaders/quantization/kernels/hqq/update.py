"""One update of zeros by HQQ's proximal solver, for LANES columns of a batch; see solver.py for the arithmetic.

Where no error shrinks, which is so for ordinary weights, it is vector code in the order of torch's sum on a CPU with
AVX2 (aten/src/ATen/native/cpu/SumKernel.cpp). That is followed for groups of up to 256 weights, except, where groups
are columns, for the last few if their number is no multiple of 32. In larger groups and in these few, hqq's zeros
differ in their last bits. Where errors shrink, columns are updated one after another.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.hqq.batch import (
    BATCH,
    ERROR,
    HIGH,
    I64,
    LANES,
    LOW,
    MOVED,
    SCALE,
    STRIDE,
    ZERO,
    load_row,
    place_of,
    store_row,
)
from loaders.quantization.kernels.hqq.encode import codes_of
from loaders.quantization.kernels.lanes import F32, Array, Lanes, Value, kernel, vector

SHRINKS = np.float32(0.17)  # errors up to this shrink to nothing: |e| > |e|^-0.3 / 10 from 0.1^(1 / 1.3) = 0.1701 on
ROW, CASCADE = 8, 16  # of torch's sums: floats in an AVX2 vector, and rows that are summed before their sum is added


class _Update:
    """One update of LANES columns' zeros where no error shrinks, and the sums of |error| before it.

    With offset = code - weight * scale, the error is (zero - offset) / scale and the new zero the mean of the offsets.
    """

    def __init__(self, lanes: Lanes, block: Array, column: Value, size: Value, top: Value, state: Array) -> None:
        self.lanes = lanes
        self.none = lanes.const(ir.VectorType(F32, LANES), 0)
        self._block, self._column, self._size, self._state = block, column, size, state
        self._top = lanes.splat(top, LANES)
        self._before = self._row(ZERO)
        self._inverse = lanes.b.fdiv(lanes.const(self.none.type, 1), self._row(SCALE))

    def _row(self, row: int) -> Value:
        return load_row(self.lanes, self._state, row, self._column)

    def _offset(self, scaled: Value) -> Value:
        return self.lanes.b.fsub(codes_of(self.lanes, scaled, self._before, self._top), scaled)

    def _offset_of(self, weight: Value) -> Value:
        return self._offset(self.lanes.load(self._block, place_of(self.lanes, weight, self._column), LANES))

    def _distance(self, offset: Value) -> Value:
        return self.lanes.absolute(self.lanes.b.fsub(self._before, offset))

    def add(self, weight: Value, total: Value, away: Value) -> list[Value]:
        """Add the offsets of one weight of each group to `total`, and their distances from the zeros to `away`."""
        offset = self._offset_of(weight)
        return [self.lanes.b.fadd(total, offset), self.lanes.b.fadd(away, self._distance(offset))]

    def shrinks(self) -> Value:
        """Whether an error exceeds SHRINKS."""

        def extend(weight: Value, worst: Value) -> list[Value]:
            return [self.lanes.larger(self._distance(self._offset_of(weight)), worst)]

        [worst] = self.lanes.fold(ir.Constant(self._size.type, 0), self._size, 1, [self.none], extend)
        return self._exceeds(worst, float(SHRINKS))

    def may_shrink(self) -> Value:
        """Whether an error may exceed SHRINKS, by the least and greatest weights alone.

        A code is within half a step of its weight, or at an end: then the group's least or greatest weight is the
        farthest from it. Roundings of zeros and weights, 2^-24 of themselves each, come on top.
        """
        lanes, b = self.lanes, self.lanes.b
        size, farthest = b.fadd(lanes.absolute(self._before), self._top), lanes.const(self.none.type, 0.5)
        for end in (self._row(LOW), self._row(HIGH)):
            size = b.fadd(size, lanes.absolute(end))
            farthest = lanes.larger(self._distance(self._offset(end)), farthest)
        farthest = b.fadd(farthest, lanes.op("fmul", size, 2.0**-20))
        return self._exceeds(farthest, float(SHRINKS) * (1 - 2.0**-20))

    def _exceeds(self, distance: Value, limit: float) -> Value:
        """Whether a distance, as an error, exceeds a limit in any column, or is not a number."""
        b = self.lanes.b
        above = b.fcmp_unordered(">", b.fmul(distance, self._inverse), self.lanes.const(self.none.type, limit))
        return b.icmp_unsigned("!=", self._bits(above), ir.Constant(I64, 0))

    def _bits(self, mask: Value) -> Value:
        return self.lanes.b.zext(self.lanes.b.bitcast(mask, ir.IntType(LANES)), I64)

    def end(self, total: Value, away: Value, number: Value) -> Value:
        """Store the new zeros from the sum of all offsets, and the sums of |error|; return which moved, a bit each.

        Those get the update's number as the last that moved them.
        """
        lanes, b = self.lanes, self.lanes.b
        after = b.fdiv(total, lanes.splat(b.sitofp(self._size, F32), LANES))
        moves = b.fcmp_unordered("!=", after, self._before)
        moved = b.select(moves, lanes.splat(number, LANES), self._row(MOVED))
        for row, value in ((ZERO, after), (ERROR, b.fmul(away, self._inverse)), (MOVED, moved)):
            store_row(lanes, value, self._state, row, self._column)
        return self._bits(moves)


@vector(types.boolean)
def may_shrink(lanes: Lanes, block: Array, column: Value, size: Value, top: Value, state: Array) -> Value:
    return _Update(lanes, block, column, size, top, state).may_shrink()


@vector(types.boolean)
def shrinks(lanes: Lanes, block: Array, column: Value, size: Value, top: Value, state: Array) -> Value:
    return _Update(lanes, block, column, size, top, state).shrinks()


def _by_columns(update: _Update, size: Value, number: Value) -> Value:
    """Make an update whose sums are torch's over columns: runs of CASCADE rows, each added to a total when it is full.

    What is left over is summed by itself, and the total is added to it last.
    """
    lanes, b, nothing = update.lanes, update.lanes.b, ir.Constant(size.type, 0)
    whole = lanes.op("mul", b.sdiv(size, ir.Constant(size.type, CASCADE)), CASCADE)

    def add_run(first: Value, total: Value, away: Value) -> list[Value]:
        run, away = lanes.fold(first, lanes.op("add", first, CASCADE), 1, [update.none, away], update.add)
        return [b.fadd(total, run), away]

    total, away = lanes.fold(nothing, whole, CASCADE, [update.none] * 2, add_run)
    run, away = lanes.fold(whole, size, 1, [update.none, away], update.add)
    return update.end(b.fadd(run, total), away, number)


def _by_rows(update: _Update, size: Value, number: Value) -> Value:
    """Make an update whose sums are torch's over rows: vectors of ROW weights go to four sums in turn.

    The four are added, and then the lanes of the vector one after another. Here each of torch's lanes is a pass of its
    own (`across`), since the lanes of this kernel are groups.
    """
    lanes, b, nothing, step = update.lanes, update.lanes.b, ir.Constant(size.type, 0), 4 * ROW
    whole = lanes.op("mul", b.sdiv(size, ir.Constant(size.type, step)), step)

    def add_lane(across: Value, total: Value, away: Value) -> list[Value]:
        def add_four(first: Value, away: Value, *sums: Value) -> list[Value]:
            found = []
            for part, one in enumerate(sums):
                grown, away = update.add(lanes.op("add", b.add(first, across), ROW * part), one, away)
                found.append(grown)
            return [away, *found]

        def add_rest(first: Value, one: Value, away: Value) -> list[Value]:
            return update.add(b.add(first, across), one, away)

        away, *sums = lanes.fold(nothing, whole, step, [away, *[update.none] * 4], add_four)
        one, away = lanes.fold(whole, size, ROW, [sums[0], away], add_rest)
        for other in sums[1:]:
            one = b.fadd(one, other)
        return [b.fadd(total, one), away]

    total, away = lanes.fold(nothing, ir.Constant(size.type, ROW), 1, [update.none] * 2, add_lane)
    return update.end(total, away, number)


@vector(types.int64)
def _update_columns(
    lanes: Lanes, block: Array, column: Value, size: Value, top: Value, number: Value, state: Array
) -> Value:
    return _by_columns(_Update(lanes, block, column, size, top, state), size, number)


@vector(types.int64)
def _update_rows(
    lanes: Lanes, block: Array, column: Value, size: Value, top: Value, number: Value, state: Array
) -> Value:
    return _by_rows(_Update(lanes, block, column, size, top, state), size, number)


@kernel
def update_quickly(block, column, size, top, across, number, state):  # type: ignore[no-untyped-def]
    """Make an update of LANES columns, in the order of torch's sums; return which zeros moved, a bit each."""
    if across:
        return _update_columns(block, column, size, top, number, state)
    return _update_rows(block, column, size, top, number, state)


@kernel
def update_slowly(block, column, size, top, state):  # type: ignore[no-untyped-def]
    """Make an update of LANES columns in which errors shrink, one after another; return whether a zero changed."""
    changes = False
    for at in range(column, column + LANES):
        before, scale = state[ZERO * BATCH + at], state[SCALE * BATCH + at]
        inverse = np.float32(1) / scale
        total, away = np.float32(0), np.float32(0)
        for k in range(size):
            scaled = block[k * STRIDE + at]
            code = min(max(np.rint(scaled + before), np.float32(0)), top)
            offset = code - scaled
            distance = (before - offset) * inverse
            magnitude = abs(distance)
            shrunk = np.float32(0)
            if magnitude > SHRINKS:
                shrunk = max(magnitude - np.float32(0.1) * magnitude ** np.float32(-0.3), np.float32(0))
            total += offset + np.copysign(shrunk, distance) * scale
            away += magnitude
        after = np.float32(total / np.float32(size))
        changes = changes or after != before
        state[ZERO * BATCH + at] = after
        state[ERROR * BATCH + at] = away
    return changes
