"""Blocks of ggml's types compared with the weights that they were made of, in one call a range.

A block is decoded into registers and compared there: decoded weights that go to memory and back take longer than both
together. data: uint8, whole blocks; x: their raw weights; sums: those of kernels/compare.py, the same as by way of a
whole decoded range.

There is a kernel for each type, since one that branched would compile the decoders of all types for a job of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import nearest
from loaders.quantization.kernels.compare import CHUNK, NONFINITE, WRONG, Group, add_groups, add_slowly, settle
from loaders.quantization.kernels.ggml import bounds, decode
from loaders.quantization.kernels.lanes import Array, Lanes, Value, inlined, kernel, vector

N, SUPER = 32, 256  # weights in a block; a chunk holds whole blocks


def _adder(values: Callable[[Lanes, Array, Value], list[Value]], size: int, group: int = N) -> Any:
    """Return what sums the differences of weights [start, stop) of a type: see `compare.add_groups`.

    `values` decodes a block, of `group` weights and `size` bytes, that begins at a byte.
    """

    @vector(types.float64)
    def add(lanes: Lanes, data: Array, x: Array, start: Value, stop: Value, totals: Array) -> Value:
        def of_group(g: Value) -> Group:
            return (lanes.op("mul", g, size),)

        def decoded(at: Value, own: Group) -> list[Value]:
            return values(lanes, data, *own)

        every = ir.Constant(start.type, group)
        return add_groups(lanes, x, start, stop, every, totals, of_group, decoded, in_order=group)

    return add


@inlined
def _compare(data, x, sums, add, decode_all, size, group=N):  # type: ignore[no-untyped-def]
    """Compare blocks of `group` weights and `size` bytes by the type's `_adder` and its decoder."""
    totals = np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        if not settle(add(data, x, start, stop, totals), totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode_all(data[start // group * size :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)


_add_q8_0 = _adder(decode.eight, 34)


@kernel
def _q8_0(data, x, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, sums, _add_q8_0, decode.q8_0, 34)


_add_q4_0 = _adder(decode.four_centred, 18)


@kernel
def _q4_0(data, x, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, sums, _add_q4_0, decode.q4_0, 18)


_add_q4_1 = _adder(decode.four_offset, 20)


@kernel
def _q4_1(data, x, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, sums, _add_q4_1, decode.q4_1, 20)


_add_q5_0 = _adder(decode.five_centred, 22)


@kernel
def _q5_0(data, x, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, sums, _add_q5_0, decode.q5_0, 22)


_add_q5_1 = _adder(decode.five_offset, 24)


@kernel
def _q5_1(data, x, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, sums, _add_q5_1, decode.q5_1, 24)


_add_tq2_0 = _adder(decode.four_trits, 66, SUPER)


@kernel
def _tq2_0(data, x, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, sums, _add_tq2_0, decode.tq2_0, 66, SUPER)


@vector(types.float64)
def _add_mxfp4(lanes: Lanes, data: Array, x: Array, terms: Value, start: Value, stop: Value, totals: Array) -> Value:
    """Sum the differences of weights [start, stop), and tell of those that are not the nearest: see `add_groups`."""
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


@kernel
def mxfp4(data, x, terms, sums):  # type: ignore[no-untyped-def]
    """Do as the others, and hold weights to be the nearest of their codes by `terms`: see mlx/microfloat.py."""
    totals = np.zeros(4, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        largest = _add_mxfp4(data, x, terms, start, stop, totals)
        is_off = totals[3] != 0
        if not settle(largest, totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode.mxfp4(data[start // N * 17 :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)
        if is_off and not sums[NONFINITE]:
            sums[WRONG] = 1


@vector(types.float64)
def _add_of_mean(lanes: Lanes, data: Array, x: Array, room: Value, start: Value, stop: Value, totals: Array) -> Value:
    """Sum the differences of weights [start, stop), and tell of those that are not the nearest: see `add_groups`."""
    growth, floor, slope = (lanes.splat(lanes.b.extract_value(room, index), 16) for index in range(3))

    def of_group(g: Value) -> Group:
        place = lanes.op("mul", g, 66)
        high, half = bounds.of_ternary(lanes, data, lanes.op("add", place, 64))
        return place, high, lanes.b.fadd(lanes.b.fmul(half, growth), floor)

    def decoded(at: Value, own: Group) -> list[Value]:
        return decode.four_trits(lanes, data, own[0])

    def is_off(source: Value, value: Value, own: Group) -> Value:
        return nearest.is_far(lanes, source, value, lanes.b.fneg(own[1]), own[1], own[2], slope)

    every = ir.Constant(start.type, SUPER)
    return add_groups(lanes, x, start, stop, every, totals, of_group, decoded, is_off, in_order=SUPER)


@kernel
def tq2_0_of_mean(data, x, room, sums):  # type: ignore[no-untyped-def]
    """Do as `mxfp4` does for TQ2_0, whose codes -1, 0 and 1 end at the block's scale: see bounds.py, `room_terms`."""
    totals = np.zeros(4, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        largest = _add_of_mean(data, x, room, start, stop, totals)
        is_off = totals[3] != 0
        if not settle(largest, totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode.tq2_0(data[start // SUPER * 66 :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)
        if is_off and not sums[NONFINITE]:
            sums[WRONG] = 1


COMPARERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "TQ2_0": _tq2_0}
assert np.gcd(CHUNK, SUPER) == SUPER
