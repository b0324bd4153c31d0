"""HQQ's encoder: groups scaled to integer codes, their zeros moved by a proximal solver.

Source: Mobius Labs, https://mobiusml.github.io/hqq_blog; hqq 0.2.8, hqq/core/quantize.py (Quantizer.quantize) and
optimize.py (optimize_weights_proximal_legacy). For each group of weights, in float32 as on a CPU:
    scale = top * (1 / (max - min)), 1 where max - min <= 1e-4, at most 2e4;  zero = -min * scale, perhaps rounded
and then, up to UPDATES times, over the whole tensor at once:
    code = clamp(round(w * scale + zero), 0, top);  error = w - (code - zero) / scale
    zero = mean(code - (w - shrink(error)) * scale),  shrink(e) = sign(e) * max(|e| - |e|^-0.3 / 10, 0)
The solver stops after the first update whose error was no less than the one before; its zeros are kept all the same.
Errors below 0.17 shrink to nothing, which are all errors of ordinary weights, so the power is computed only where an
error exceeds that.

A vector holds one weight of each of some groups, so that a group's sums are taken in its own order whatever lies
beside it. The order is that of torch's sum on a CPU with AVX2 (aten/src/ATen/native/cpu/SumKernel.cpp). It is followed
for groups of up to 256 weights, except, where groups are columns, for the last few if their number is no multiple of
32. In larger groups and in these few, hqq's zeros differ in their last bits. Once a group's zero does not change in an
update, all further updates would repeat themselves and are skipped.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.compare import float_at
from loaders.quantization.kernels.lanes import (
    F32,
    I8,
    I32,
    Array,
    Lanes,
    Value,
    aligned_floats,
    kernel,
    transpose,
    vector,
)

LANES = 16  # groups side by side in a vector
BATCH = 256  # groups solved together
STRIDE = BATCH + LANES  # from row to row of a block; with a power of two, rows would share few places of the cache
UNKNOWN = 255  # more than any number of updates
SHRINKS = np.float32(0.17)  # errors up to this shrink to nothing: |e| > |e|^-0.3 / 10 from 0.1^(1 / 1.3) = 0.1701 on
SMALLEST_RANGE, LARGEST_SCALE = np.float32(1e-4), np.float32(2e4)  # hqq's guards: small ranges, and float16's range
F64 = ir.DoubleType()
I64 = ir.IntType(64)
ROW, CASCADE = 8, 16  # of torch's sums: floats in an AVX2 vector, and rows that are summed before their sum is added
# The rows of a batch's state, an entry for each column of its block: the zero and scale of its group, the group's ends
# times the scale, the sum of |error|, the last update that moved the zero, and which of the batch's groups it is. The
# last row has an entry for each group, its latest sum of |error|.
ZERO, SCALE, LOW, HIGH, ERROR, MOVED, GROUP, SETTLED, STATES = range(9)


def _codes(lanes: Lanes, scaled: Value, zero: Value, top: Value) -> Value:
    """Return clamp(round(scaled + zero), 0, top), as float32."""
    above = lanes.larger(_rounded(lanes, lanes.b.fadd(scaled, zero)), lanes.const(scaled.type, 0))
    return lanes.b.select(lanes.b.fcmp_ordered("<", above, top), above, top)


def _rounded(lanes: Lanes, value: Value) -> Value:
    return lanes.call(f"llvm.rint.v{value.type.count}f32", value.type, value)


# --- a block: float32 (size, STRIDE), a group in each of the first BATCH columns


@vector(types.void)
def _copy(lanes: Lanes, x: Array, at: Value, block: Array, to: Value) -> None:
    """Write one weight of each of LANES groups that lie side by side."""
    lanes.store(lanes.floats(x, at, LANES), block, to)


@kernel
def _fill(x, first, by_group, by_weight, groups, size, block):  # type: ignore[no-untyped-def]
    """Fill a block with up to BATCH groups; columns without a group are zeros, which add nothing to any sum.

    Weight k of group g is x[g * by_group + k * by_weight].
    """
    start, whole = first * by_group, groups // LANES * LANES
    turned = 0 if by_group == 1 else size // LANES * LANES
    for g in range(0, whole, LANES):
        at = start + g * by_group
        if by_group == 1:
            for k in range(size):
                _copy(x, at + k * by_weight, block, k * STRIDE + g)
            continue
        for k in range(0, turned, LANES):
            transpose(x, at + k, by_group, block, k * STRIDE + g, STRIDE)
        for k in range(turned, size):
            for lane in range(LANES):
                block[k * STRIDE + g + lane] = float_at(x, at + lane * by_group + k)
    for g in range(whole, BATCH):
        for k in range(size):
            block[k * STRIDE + g] = float_at(x, start + g * by_group + k * by_weight) if g < groups else np.float32(0)


def _row(lanes: Lanes, state: Array, row: int, column: Value) -> Value:
    return lanes.load(state, lanes.op("add", column, row * BATCH), LANES)


def _put_row(lanes: Lanes, value: Value, state: Array, row: int, column: Value) -> None:
    lanes.store(value, state, lanes.op("add", column, row * BATCH))


def _place(lanes: Lanes, weight: Value, column: Value) -> Value:
    """Return the entry of a block at which a row of some columns begins."""
    return lanes.b.add(lanes.op("mul", weight, STRIDE), column)


@vector(types.void)
def _begin(lanes: Lanes, block: Array, column: Value, size: Value, top: Value, rounds: Value, state: Array) -> None:
    """Compute the scales and first zeros of LANES columns, and multiply the columns by their scales.

    All later steps need weight * scale, and never the weight.
    """
    b, nothing = lanes.b, ir.Constant(size.type, 0)

    def extend(k: Value, least: Value, most: Value) -> list[Value]:
        value = lanes.load(block, _place(lanes, k, column), LANES)
        return [b.select(b.fcmp_ordered("<", least, value), least, value), lanes.larger(most, value)]

    low, high = lanes.fold(nothing, size, 1, [lanes.load(block, column, LANES)] * 2, extend)
    span, one = b.fsub(high, low), lanes.const(low.type, 1)
    is_flat = b.fcmp_ordered("<=", span, lanes.const(low.type, SMALLEST_RANGE))
    ratio = b.fmul(b.fdiv(one, span), lanes.splat(top, LANES))  # torch divides a number by a tensor in two roundings
    found = b.select(is_flat, one, ratio)
    limit = lanes.const(low.type, LARGEST_SCALE)
    found = b.select(b.fcmp_ordered(">", found, limit), limit, found)
    begun = b.fneg(b.fmul(low, found))
    is_rounded = b.icmp_unsigned("!=", rounds, ir.Constant(rounds.type, 0))
    zero = b.select(is_rounded, _rounded(lanes, begun), begun)
    ends = b.fmul(low, found), b.fmul(high, found)
    for row, value in ((ZERO, zero), (SCALE, found), (LOW, ends[0]), (HIGH, ends[1])):
        _put_row(lanes, value, state, row, column)

    def multiply(k: Value) -> list[Value]:
        at = _place(lanes, k, column)
        lanes.store(b.fmul(lanes.load(block, at, LANES), found), block, at)
        return []

    lanes.fold(nothing, size, 1, [], multiply)


@kernel
def _prepare(x, first, by_group, by_weight, groups, size, top, rounds, block, state):  # type: ignore[no-untyped-def]
    _fill(x, first, by_group, by_weight, groups, size, block)
    for column in range(0, BATCH, LANES):
        _begin(block, column, size, top, np.int32(rounds), state)
    for column in range(BATCH):
        state[GROUP * BATCH + column] = column
        state[MOVED * BATCH + column] = 0


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
        return _row(self.lanes, self._state, row, self._column)

    def _offset(self, scaled: Value) -> Value:
        return self.lanes.b.fsub(_codes(self.lanes, scaled, self._before, self._top), scaled)

    def _offset_of(self, weight: Value) -> Value:
        return self._offset(self.lanes.load(self._block, _place(self.lanes, weight, self._column), LANES))

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
            _put_row(lanes, value, self._state, row, self._column)
        return self._bits(moves)


@vector(types.boolean)
def _may_shrink(lanes: Lanes, block: Array, column: Value, size: Value, top: Value, state: Array) -> Value:
    return _Update(lanes, block, column, size, top, state).may_shrink()


@vector(types.boolean)
def _shrinks(lanes: Lanes, block: Array, column: Value, size: Value, top: Value, state: Array) -> Value:
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
def _update(block, column, size, top, across, number, state):  # type: ignore[no-untyped-def]
    """Make an update of LANES columns, in the order of torch's sums; return which zeros moved, a bit each."""
    if across:
        return _update_columns(block, column, size, top, number, state)
    return _update_rows(block, column, size, top, number, state)


@vector(types.void)
def _close_up(lanes: Lanes, block: Array, column: Value, size: Value, state: Array, moves: Value, to: Value) -> None:
    """Move those of LANES columns whose bit in `moves` is set to column `to` and the next.

    Columns after these are left as copies of others, which do no harm: they find what the others find.
    """
    mask = lanes.b.bitcast(lanes.b.trunc(moves, ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))

    def close(array: Array, at: Value, place: Value) -> None:
        values = lanes.load(array, at, LANES)
        name = f"llvm.experimental.vector.compress.v{LANES}f32"
        lanes.store(lanes.call(name, values.type, values, mask, values), array, place)

    def close_row(k: Value) -> list[Value]:
        close(block, _place(lanes, k, column), _place(lanes, k, to))
        return []

    lanes.fold(ir.Constant(size.type, 0), size, 1, [], close_row)
    for row in range(SETTLED):
        close(state, lanes.op("add", column, row * BATCH), lanes.op("add", to, row * BATCH))


@vector(types.int64)
def _count(lanes: Lanes, bits: Value) -> Value:
    return lanes.call("llvm.ctpop.i64", I64, bits)


@kernel
def _whole(columns):  # type: ignore[no-untyped-def]
    """Return how many columns there are in the vectors of some columns."""
    return (columns + LANES - 1) // LANES * LANES


@kernel
def _close_up_all(block, active, size, state, moves):  # type: ignore[no-untyped-def]
    """Move the columns whose zeros still move to the front; return how many columns there are, a multiple of LANES."""
    to = 0
    for column in range(0, active, LANES):
        if moves[column // LANES]:
            _close_up(block, column, size, state, moves[column // LANES], to)
            to += _count(moves[column // LANES])
    return _whole(to)


@kernel
def _update_slowly(block, column, size, top, state):  # type: ignore[no-untyped-def]
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


@vector(types.void)
def _add(lanes: Lanes, errors: Array, first: Value, stop: Value, sums: Array, at: Value) -> None:
    """Add errors [first, stop), LANES at a time, to as many float64 sums."""

    def add(place: Value, total: Value) -> list[Value]:
        wide = lanes.b.fpext(lanes.load(errors, place, LANES), total.type)
        return [lanes.b.fadd(total, wide)]

    begun = lanes.b.load(sums.pointer(at, ir.VectorType(F64, LANES)), align=8)
    [total] = lanes.fold(first, stop, LANES, [begun], add)
    lanes.b.store(total, sums.pointer(at, total.type), align=8)


@kernel
def _copy_all(values, copy):  # type: ignore[no-untyped-def]
    """Copy an array. numba takes seconds to compile its own assignment of slices."""
    for i in range(values.size):
        copy[i] = values[i]


@kernel
def _solve_quickly(block, groups, size, top, across, updates, state, moves, zeros, moved, sums, saved):  # type: ignore[no-untyped-def]
    """Make all updates of a block; return False, with nothing done, if errors may shrink.

    Once a zero stays as it is, all further updates of its group would repeat themselves. Whenever half of the columns
    have come to that, the others move together. zeros: float32, moved: uint8, an entry for each group: see `solve`;
    moves, saved: memory for a bit of each column, and for what the sums were.
    """
    active = _whole(groups)
    _copy_all(sums, saved)
    for i in range(updates):
        count = 0
        for column in range(0, active, LANES):
            if _may_shrink(block, column, size, top, state):
                _copy_all(saved, sums)
                return False
            moves[column // LANES] = _update(block, column, size, top, across, np.float32(i + 1), state)
            count += _count(moves[column // LANES])
        for column in range(active):
            state[SETTLED * BATCH + np.int64(state[GROUP * BATCH + column])] = state[ERROR * BATCH + column]
        _add(state, SETTLED * BATCH, SETTLED * BATCH + _whole(groups), sums, i * LANES)
        if 2 * _whole(count) <= active or i == updates - 1:
            for column in range(active):
                g = np.int64(state[GROUP * BATCH + column])
                if g < groups:
                    zeros[g], moved[g] = state[ZERO * BATCH + column], np.uint8(state[MOVED * BATCH + column])
            active = _close_up_all(block, active, size, state, moves)
    return True


@kernel
def _solve_slowly(block, groups, size, top, across, updates, state, zeros, moved, sums):  # type: ignore[no-untyped-def]
    """Make all updates of a block in which errors may shrink, LANES columns after another."""
    for column in range(0, groups, LANES):
        moves = True
        for i in range(updates):
            if moves and _shrinks(block, column, size, top, state):
                moves = _update_slowly(block, column, size, top, state)
            elif moves:
                moves = _update(block, column, size, top, across, np.float32(0), state) != 0
            _add(state, ERROR * BATCH + column, ERROR * BATCH + column + LANES, sums, i * LANES)
        for at in range(column, min(column + LANES, groups)):
            zeros[at], moved[at] = state[ZERO * BATCH + at], np.uint8(UNKNOWN)


@kernel
def _are_known(moved, first, last, updates):  # type: ignore[no-untyped-def]
    """Whether no zero of groups [first, last) moved after some updates."""
    latest = 0
    for g in range(first, last):
        latest = max(latest, int(moved[g]))
    return latest <= updates


@kernel
def solve(x, by_group, by_weight, size, top, rounds, tile, scales, zeros, moved, errors):  # type: ignore[no-untyped-def]
    """Find scales and zeros of groups by a fixed number of updates, where they are not known yet.

    Weight k of group g is x[g * by_group + k * by_weight]; one of the two strides is 1. `rounds` says whether the first
    zero is rounded. scales, zeros: float32 (groups,); moved: uint8 (groups,), the number of updates after which a zero
    moved no more, or UNKNOWN before the first search, and where errors may shrink: only there does a zero depend on the
    LANES groups beside it. errors: float64 (tiles, updates), to which the sum of |error| before each update is added,
    for every `tile` groups, a multiple of BATCH, in an order that depends on their number alone.

    A batch of groups whose zeros move no more after `updates` is left as it is, and adds no errors.
    """
    updates, across = errors.shape[1], by_group == 1
    block, state = aligned_floats(size * STRIDE), aligned_floats(STATES * BATCH)
    sums, saved = np.empty(updates * LANES, np.float64), np.empty(updates * LANES, np.float64)
    moves = np.empty(BATCH // LANES, np.int64)
    for start in range(0, scales.size, tile):
        for i in range(sums.size):
            sums[i] = 0
        for first in range(start, min(start + tile, scales.size), BATCH):
            last = min(first + BATCH, scales.size)
            if _are_known(moved, first, last, updates):
                continue
            groups, some_zeros, some_moved = last - first, zeros[first:last], moved[first:last]
            _prepare(x, first, by_group, by_weight, groups, size, top, rounds, block, state)
            for g in range(groups):
                scales[first + g] = state[SCALE * BATCH + g]
            is_done = _solve_quickly(
                block, groups, size, top, across, updates, state, moves, some_zeros, some_moved, sums, saved
            )
            if not is_done:
                _prepare(x, first, by_group, by_weight, groups, size, top, rounds, block, state)
                _solve_slowly(block, groups, size, top, across, updates, state, some_zeros, some_moved, sums)
        for i in range(updates):
            for lane in range(LANES):
                errors[start // tile, i] += sums[i * LANES + lane]


# --- codes


def _store_codes(lanes: Lanes, codes: Value, shift: Value, out: Array, at: Value) -> None:
    """Put codes into the bits of `out` (uint8 or int32) from `shift` on, which are zeros before."""
    count = codes.type.count
    wide = lanes.b.fptoui(codes, ir.VectorType(I32, count))
    moved = lanes.b.shl(wide, lanes.splat(lanes.b.trunc(shift, I32), count))
    narrow = lanes.b.trunc(moved, ir.VectorType(I8, count)) if out.element == I8 else moved
    lanes.store(lanes.b.or_(lanes.load(out, at, count), narrow), out, at)


def _code_row(
    count: int, lanes: Lanes, x: Array, at: Value, scale: Value, zero: Value, top: Value, shift: Value, out: Array
) -> None:
    """Code `count` weights of one group."""
    scaled = lanes.b.fmul(lanes.floats(x, at, count), lanes.splat(scale, count))
    codes = _codes(lanes, scaled, lanes.splat(zero, count), lanes.splat(top, count))
    _store_codes(lanes, codes, shift, out, at)


@vector(types.void)
def _code_row_16(
    lanes: Lanes, x: Array, at: Value, scale: Value, zero: Value, top: Value, shift: Value, out: Array
) -> None:
    _code_row(16, lanes, x, at, scale, zero, top, shift, out)


@vector(types.void)
def _code_row_8(
    lanes: Lanes, x: Array, at: Value, scale: Value, zero: Value, top: Value, shift: Value, out: Array
) -> None:
    _code_row(8, lanes, x, at, scale, zero, top, shift, out)


@kernel
def code_rows(x, size, scales, zeros, top, shift, out):  # type: ignore[no-untyped-def]
    """Code groups that lie one after another, into the bits from `shift` on. x: (n,); out: uint8 or int32 (n,)."""
    for g in range(scales.size):
        if size % 16 == 0:
            for at in range(g * size, (g + 1) * size, 16):
                _code_row_16(x, at, scales[g], zeros[g], top, shift, out)
        else:
            for at in range(g * size, (g + 1) * size, 8):
                _code_row_8(x, at, scales[g], zeros[g], top, shift, out)


def _code_across(
    count: int, lanes: Lanes, x: Array, g: Value, scales: Array, zeros: Array, top: Value, shift: Value, out: Array
) -> None:
    """Code one weight of each of `count` groups from group g on."""
    scaled = lanes.b.fmul(lanes.floats(x, g, count), lanes.load(scales, g, count))
    codes = _codes(lanes, scaled, lanes.load(zeros, g, count), lanes.splat(top, count))
    _store_codes(lanes, codes, shift, out, g)


@vector(types.void)
def _code_across_16(
    lanes: Lanes, x: Array, g: Value, scales: Array, zeros: Array, top: Value, shift: Value, out: Array
) -> None:
    _code_across(16, lanes, x, g, scales, zeros, top, shift, out)


@vector(types.void)
def _code_across_1(
    lanes: Lanes, x: Array, g: Value, scales: Array, zeros: Array, top: Value, shift: Value, out: Array
) -> None:
    _code_across(1, lanes, x, g, scales, zeros, top, shift, out)


@kernel
def code_columns(x, size, scales, zeros, top, shift, bits, rows, out):  # type: ignore[no-untyped-def]
    """Code groups that are the columns of x (size, groups). out: uint8 or int32 (rows, groups).

    An item holds the codes of weights `rows` apart: the first from bit `shift` on, the next `bits` below it.
    """
    groups = scales.size
    whole = groups // 16 * 16
    out[:] = 0
    for k in range(size):
        weights, items = x[k * groups : (k + 1) * groups], out[k % rows * groups : (k % rows + 1) * groups]
        place = shift - bits * (k // rows)
        for g in range(0, whole, 16):
            _code_across_16(weights, g, scales, zeros, top, place, items)
        for g in range(whole, groups):
            _code_across_1(weights, g, scales, zeros, top, place, items)
