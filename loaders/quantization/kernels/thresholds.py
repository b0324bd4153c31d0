"""Codes of bfloat16 weights by their own bits: each is compared with thresholds, and their number below it is its rank.

A code of a scaled weight rises with the weight, so that "above bound i" means exactly "above the last bfloat16 that is
not". bfloat16s sort as the integers of `sortable` do. Twice as many of them fit a register as of float32 quotients, and
nothing is divided.

Where a register permutation looks sixteen thresholds up at once (AVX-512BW), four comparisons find a rank: a binary
search. `searches` says whether a kernel may be made so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import I16, Array, Lanes, Value, host_has, vector

BY_LANES = 32  # weights that are searched at once
NEVER = 0x7FFF  # a threshold that nothing is above, for tables of fewer than fifteen


def last_below(is_above: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """Find for each of `count` bounds the last bfloat16 that is not above it, as a sortable int16: (count,).

    `is_above` takes a float32 value for each bound, and rises with it. A bound below -infinity gets an int16 that all
    are above.
    """
    low, high = np.full(count, -0x7F82), np.full(count, 0x7F80)  # just below -infinity, which sorts last; infinity
    while (low < high).any():
        middle = (low + high + 1) >> 1
        bits = np.where(middle < 0, middle ^ 0x7FFF, middle).astype(np.uint16)
        above = is_above((bits.astype(np.uint32) << 16).view(np.float32))
        low, high = np.where(above, low, middle), np.where(above, middle - 1, high)
    return low.astype(np.int16)


def is_searched(x: Array) -> bool:
    """Whether weights of the dtype of `x` are searched on the machine that the kernel is compiled for."""
    return bool(x.holds == types.uint16 and host_has("avx512bw"))


@vector(types.boolean)
def searches(lanes: Lanes, x: Array) -> Value:
    """Return `is_searched` of an array to a kernel, as a constant."""
    return ir.Constant(ir.IntType(1), int(is_searched(x)))


def sortable(lanes: Lanes, x: Array, at: Value, count: int) -> Value:
    """Return the bits of `count` bfloat16s as int16s that sort as the numbers do, -0 just below 0."""
    bits = lanes.load(x, at, count)
    return lanes.b.xor(bits, lanes.op("and_", lanes.op("ashr", bits, 15), 0x7FFF))


def ranks(lanes: Lanes, values: Value, thresholds: Value) -> Value:
    """Return how many of fifteen rising thresholds each int16 lane is above, by a binary search.

    thresholds: 16 int16 lanes, the last of which is spare; or 32, fifteen and a spare for each half of 32 values, and
    then the second half's ranks count from 16.

    A position is one less than that of the threshold to compare with, so that what the last comparison adds is 1 or 2
    and never 0: LLVM would make several instructions of a 0 or 1.
    """
    count, kind = values.type.count, values.type
    bases = [16 * (lane // 16) if thresholds.type.count == 32 else 0 for lane in range(count)]
    moved = lanes.shuffle(thresholds, [*range(1, thresholds.type.count), 0])
    position, bound = (
        lanes.const(kind, [base + 6 for base in bases]),
        lanes.shuffle(thresholds, [base + 7 for base in bases]),
    )
    for step in (4, 2, 1):
        is_above = lanes.b.icmp_signed(">", values, bound)
        steps = lanes.b.select(is_above, lanes.const(kind, step), lanes.const(kind, -step))
        position = lanes.b.add(position, steps)
        bound = lanes.lookup_16(moved, position)
    is_above = lanes.b.icmp_signed(">", values, bound)
    return lanes.b.add(position, lanes.b.select(is_above, lanes.const(kind, 2), lanes.const(kind, 1)))


def store_e2m1(
    lanes: Lanes, order: Sequence[int], x: Array, at: Value, rows: Array, row: Sequence[Value], packed: Array
) -> None:
    """Code 32 bfloat16s into bytes of two codes, the first low: order[rank] among the thresholds of a row of `rows`.

    rows: int16 (n * 16,); row: the index of the row of all 32, or of two rows, one for each half.
    """
    tables = [lanes.load(rows, lanes.op("shl", each, 4), 16) for each in row]
    found = ranks(lanes, sortable(lanes, x, at, BY_LANES), lanes.join(tables))
    codes = lanes.lookup_16(lanes.const(ir.VectorType(I16, 16), order), found)
    lanes.store(lanes.nibbles(codes, first_high=False), packed, lanes.op("lshr", at, 1))
