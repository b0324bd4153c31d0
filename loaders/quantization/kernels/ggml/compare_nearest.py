"""Blocks of ggml's types compared as in kernels/ggml/compare.py, and held to be the nearest that their scales allow.

So are those types measured that search for their scales and codes, whose weights no step of a code bounds: each weight
is held against the grid of its sub-block (see kernels/ggml/bounds.py), in the same call and in registers. A weight that
is not the nearest makes the range wrong. A NaN in the source may spoil the scale of its whole group, so grids say
nothing from the first chunk on that holds one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import nearest
from loaders.quantization.kernels.compare import (
    CHUNK,
    LANES,
    NONFINITE,
    WRONG,
    Group,
    add_groups,
    add_slowly,
    settle,
)
from loaders.quantization.kernels.ggml import decode, super_blocks
from loaders.quantization.kernels.ggml.bounds import bounds_of
from loaders.quantization.kernels.ggml.super_blocks import SUPER, SuperBlock
from loaders.quantization.kernels.lanes import Array, Lanes, Value, inlined, kernel, vector

N = 32  # weights in a block of MXFP4


def _adder(block: SuperBlock) -> Any:
    """Return what sums the differences of weights [start, stop) of a type, and tells of those that are not the nearest.

    See `compare.add_groups`. terms: those of `grid.room_terms`.
    """

    @vector(types.float64)
    def add(lanes: Lanes, data: Array, x: Array, terms: Value, start: Value, stop: Value, totals: Array) -> Value:
        growth, floor, slope = (lanes.b.extract_value(terms, index) for index in range(3))

        def of_group(g: Value) -> Group:
            place = lanes.op("mul", g, block.size)
            scale, minimum = block.scales(lanes, data, place)
            low, high, half = bounds_of(lanes, block, (scale, minimum))
            count = half.type.count
            half = lanes.b.fadd(lanes.b.fmul(half, lanes.splat(growth, count)), lanes.splat(floor, count))
            return place, scale, minimum, low, high, half

        def decoded(at: Value, own: Group) -> list[Value]:
            place, scale, minimum, *_ = own
            return block.weights(lanes, data, place, (scale, minimum))

        def of_part(own: Group, part: int) -> Group:
            return tuple(super_blocks.of_part(lanes, each, part) for each in own[3:])

        def is_off(source: Value, value: Value, own: Group) -> Value:
            low, high, half = own
            return nearest.is_far(lanes, source, value, low, high, half, lanes.splat(slope, LANES))

        every = ir.Constant(start.type, SUPER)
        return add_groups(lanes, x, start, stop, every, totals, of_group, decoded, is_off, SUPER, of_part)

    return add


@vector(types.float64)
def _add_mxfp4(lanes: Lanes, data: Array, x: Array, terms: Value, start: Value, stop: Value, totals: Array) -> Value:
    """Do as `_adder` says for MXFP4. terms: those of `grid.symmetric_terms`."""
    symmetric = nearest.Symmetric(lanes, terms)

    def of_group(g: Value) -> Group:
        place = lanes.op("mul", g, 17)
        scale = decode.scale_of_mxfp4(lanes, data, place)
        return place, scale, *symmetric.bounds(scale)

    def decoded(at: Value, own: Group) -> list[Value]:
        return decode.four_floating(lanes, data, own[0], own[1])

    def is_off(source: Value, value: Value, own: Group) -> Value:
        return symmetric.is_far(source, value, own[2:])

    return add_groups(lanes, x, start, stop, ir.Constant(start.type, N), totals, of_group, decoded, is_off, in_order=N)


@inlined
def _compare(data, x, terms, sums, add, decode_all, size, group=SUPER):  # type: ignore[no-untyped-def]
    """Compare blocks of `group` weights and `size` bytes by what adds up a type's differences, and its decoder."""
    totals = np.zeros(4, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        largest = add(data, x, terms, start, stop, totals)
        is_off = totals[3] != 0
        if not settle(largest, totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode_all(data[start // group * size :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)
        if is_off and not sums[NONFINITE]:
            sums[WRONG] = 1


_add_q2_k, _add_q3_k = _adder(super_blocks.Q2_K), _adder(super_blocks.Q3_K)
_add_q4_k, _add_q5_k = _adder(super_blocks.Q4_K), _adder(super_blocks.Q5_K)
_add_q6_k = _adder(super_blocks.Q6_K)
_add_tq1_0, _add_tq2_0 = _adder(super_blocks.TQ1_0), _adder(super_blocks.TQ2_0)


@kernel
def _mxfp4(data, x, terms, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, terms, sums, _add_mxfp4, decode.mxfp4, 17, N)


@kernel
def _q2_k(data, x, terms, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, terms, sums, _add_q2_k, super_blocks.q2_k, 84)


@kernel
def _q3_k(data, x, terms, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, terms, sums, _add_q3_k, super_blocks.q3_k, 110)


@kernel
def _q4_k(data, x, terms, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, terms, sums, _add_q4_k, super_blocks.q4_k, 144)


@kernel
def _q5_k(data, x, terms, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, terms, sums, _add_q5_k, super_blocks.q5_k, 176)


@kernel
def _q6_k(data, x, terms, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, terms, sums, _add_q6_k, super_blocks.q6_k, 210)


@kernel
def _tq1_0(data, x, terms, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, terms, sums, _add_tq1_0, super_blocks.tq1_0, 54)


@kernel
def _tq2_0(data, x, terms, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, terms, sums, _add_tq2_0, super_blocks.tq2_0, 66)


NEAREST = {
    "MXFP4": _mxfp4, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}  # fmt: skip
assert CHUNK % SUPER == 0
