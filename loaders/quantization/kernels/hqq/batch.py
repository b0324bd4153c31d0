"""A batch of groups, as HQQ's solver holds it: a block of their weights times their scales, and a state.

The block is float32 (size, STRIDE), a group in each of the first BATCH columns, and the state float32 (STATES, BATCH),
both flat. A vector holds one weight of each of LANES groups, so that a group's sums are taken in its own order whatever
lies beside it. For scales and first zeros see solver.py.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.compare import float_at
from loaders.quantization.kernels.hqq.encode import rounded
from loaders.quantization.kernels.intrinsics import transpose
from loaders.quantization.kernels.lanes import Array, Lanes, Value, kernel, vector

LANES = 16  # groups side by side in a vector
BATCH = 256  # groups solved together
STRIDE = BATCH + LANES  # from row to row of a block; with a power of two, rows would share few places of the cache
SMALLEST_RANGE, LARGEST_SCALE = np.float32(1e-4), np.float32(2e4)  # hqq's guards: small ranges, and float16's range
I64 = ir.IntType(64)
# The rows of a batch's state, an entry for each column of its block: the zero and scale of its group, the group's ends
# times the scale, the sum of |error|, the last update that moved the zero, and which of the batch's groups it is. The
# last row has an entry for each group, its latest sum of |error|.
ZERO, SCALE, LOW, HIGH, ERROR, MOVED, GROUP, SETTLED, STATES = range(9)


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


def load_row(lanes: Lanes, state: Array, row: int, column: Value) -> Value:
    return lanes.load(state, lanes.op("add", column, row * BATCH), LANES)


def store_row(lanes: Lanes, value: Value, state: Array, row: int, column: Value) -> None:
    lanes.store(value, state, lanes.op("add", column, row * BATCH))


def place_of(lanes: Lanes, weight: Value, column: Value) -> Value:
    """Return the entry of a block at which a row of some columns begins."""
    return lanes.b.add(lanes.op("mul", weight, STRIDE), column)


@vector(types.void)
def _begin(lanes: Lanes, block: Array, column: Value, size: Value, top: Value, rounds: Value, state: Array) -> None:
    """Compute the scales and first zeros of LANES columns, and multiply the columns by their scales.

    All later steps need weight * scale, and never the weight.
    """
    b, nothing = lanes.b, ir.Constant(size.type, 0)

    def extend(k: Value, least: Value, most: Value) -> list[Value]:
        value = lanes.load(block, place_of(lanes, k, column), LANES)
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
    zero = b.select(is_rounded, rounded(lanes, begun), begun)
    ends = b.fmul(low, found), b.fmul(high, found)
    for row, value in ((ZERO, zero), (SCALE, found), (LOW, ends[0]), (HIGH, ends[1])):
        store_row(lanes, value, state, row, column)

    def multiply(k: Value) -> list[Value]:
        at = place_of(lanes, k, column)
        lanes.store(b.fmul(lanes.load(block, at, LANES), found), block, at)
        return []

    lanes.fold(nothing, size, 1, [], multiply)


@kernel
def prepare(x, first, by_group, by_weight, groups, size, top, rounds, block, state):  # type: ignore[no-untyped-def]
    _fill(x, first, by_group, by_weight, groups, size, block)
    for column in range(0, BATCH, LANES):
        _begin(block, column, size, top, np.int32(rounds), state)
    for column in range(BATCH):
        state[GROUP * BATCH + column] = column
        state[MOVED * BATCH + column] = 0


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
        close(block, place_of(lanes, k, column), place_of(lanes, k, to))
        return []

    lanes.fold(ir.Constant(size.type, 0), size, 1, [], close_row)
    for row in range(SETTLED):
        close(state, lanes.op("add", column, row * BATCH), lanes.op("add", to, row * BATCH))


@vector(types.int64)
def bits_set(lanes: Lanes, bits: Value) -> Value:
    return lanes.call("llvm.ctpop.i64", I64, bits)


@kernel
def in_whole_vectors(columns):  # type: ignore[no-untyped-def]
    """Return how many columns there are in the vectors of some columns."""
    return (columns + LANES - 1) // LANES * LANES


@kernel
def close_up_all(block, active, size, state, moves):  # type: ignore[no-untyped-def]
    """Move the columns whose zeros still move to the front; return how many columns there are, a multiple of LANES."""
    to = 0
    for column in range(0, active, LANES):
        if moves[column // LANES]:
            _close_up(block, column, size, state, moves[column // LANES], to)
            to += bits_set(moves[column // LANES])
    return in_whole_vectors(to)
