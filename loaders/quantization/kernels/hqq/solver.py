"""HQQ's solver: the scales of groups, and their zeros, moved by a proximal method.

Source: Mobius Labs, https://mobiusml.github.io/hqq_blog; hqq 0.2.8, hqq/core/quantize.py (Quantizer.quantize) and
optimize.py (optimize_weights_proximal_legacy). For each group of weights, in float32 as on a CPU:
    scale = top * (1 / (max - min)), 1 where max - min <= 1e-4, at most 2e4;  zero = -min * scale, perhaps rounded
and then, up to UPDATES times, over the whole tensor at once:
    code = clamp(round(w * scale + zero), 0, top);  error = w - (code - zero) / scale
    zero = mean(code - (w - shrink(error)) * scale),  shrink(e) = sign(e) * max(|e| - |e|^-0.3 / 10, 0)
The solver stops after the first update whose error was no less than the one before; its zeros are kept all the same.
Errors below 0.17 shrink to nothing, which are all errors of ordinary weights, so the power is computed only where an
error exceeds that.

Once a group's zero does not change in an update, all further updates would repeat themselves and are skipped.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.hqq.batch import (
    BATCH,
    ERROR,
    GROUP,
    LANES,
    MOVED,
    SCALE,
    SETTLED,
    STATES,
    STRIDE,
    ZERO,
    bits_set,
    close_up_all,
    in_whole_vectors,
    prepare,
)
from loaders.quantization.kernels.hqq.update import may_shrink, shrinks, update_quickly, update_slowly
from loaders.quantization.kernels.intrinsics import aligned_floats
from loaders.quantization.kernels.lanes import Array, Lanes, Value, kernel, vector

UNKNOWN = 255  # more than any number of updates
F64 = ir.DoubleType()


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
    active = in_whole_vectors(groups)
    _copy_all(sums, saved)
    for i in range(updates):
        count = 0
        for column in range(0, active, LANES):
            if may_shrink(block, column, size, top, state):
                _copy_all(saved, sums)
                return False
            moves[column // LANES] = update_quickly(block, column, size, top, across, np.float32(i + 1), state)
            count += bits_set(moves[column // LANES])
        for column in range(active):
            state[SETTLED * BATCH + np.int64(state[GROUP * BATCH + column])] = state[ERROR * BATCH + column]
        _add(state, SETTLED * BATCH, SETTLED * BATCH + in_whole_vectors(groups), sums, i * LANES)
        if 2 * in_whole_vectors(count) <= active or i == updates - 1:
            for column in range(active):
                g = np.int64(state[GROUP * BATCH + column])
                if g < groups:
                    zeros[g], moved[g] = state[ZERO * BATCH + column], np.uint8(state[MOVED * BATCH + column])
            active = close_up_all(block, active, size, state, moves)
    return True


@kernel
def _solve_slowly(block, groups, size, top, across, updates, state, zeros, moved, sums):  # type: ignore[no-untyped-def]
    """Make all updates of a block in which errors may shrink, LANES columns after another."""
    for column in range(0, groups, LANES):
        moves = True
        for i in range(updates):
            if moves and shrinks(block, column, size, top, state):
                moves = update_slowly(block, column, size, top, state)
            elif moves:
                moves = update_quickly(block, column, size, top, across, np.float32(0), state) != 0
            _add(state, ERROR * BATCH + column, ERROR * BATCH + column + LANES, sums, i * LANES)
        for at in range(column, min(column + LANES, groups)):
            zeros[at], moved[at] = state[ZERO * BATCH + at], np.uint8(UNKNOWN)


@kernel
def add_tiles(errors, totals):  # type: ignore[no-untyped-def]
    """Add up each column of `errors` (tiles, updates), magnitudes, into `totals` (updates,); all float64.

    What additions lose is summed beside, which leaves 2^-100 of a total: as if they were exact.
    """
    for i in range(totals.size):
        total, lost = 0.0, 0.0
        for tile in range(errors.shape[0]):
            error = errors[tile, i]
            found = total + error
            back = found - total
            lost += (total - (found - back)) + (error - back)
            total = found
        totals[i] = total + lost


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
            prepare(x, first, by_group, by_weight, groups, size, top, rounds, block, state)
            for g in range(groups):
                scales[first + g] = state[SCALE * BATCH + g]
            is_done = _solve_quickly(
                block, groups, size, top, across, updates, state, moves, some_zeros, some_moved, sums, saved
            )
            if not is_done:
                prepare(x, first, by_group, by_weight, groups, size, top, rounds, block, state)
                _solve_slowly(block, groups, size, top, across, updates, state, some_zeros, some_moved, sums)
        for i in range(updates):
            for lane in range(LANES):
                errors[start // tile, i] += sums[i * LANES + lane]
