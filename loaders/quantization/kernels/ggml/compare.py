"""Blocks of ggml's types compared with the weights that they were made of, in one call a range.

A block is decoded into registers and compared there: decoded weights that go to memory and back take longer than both
together. data: uint8, whole blocks; x: their raw weights; sums: those of kernels/compare.py, the same as by way of a
whole decoded range.

There is a kernel for each type, all but alike, since one that branched would compile the decoders of all types for a
job of one; and numba keeps no kernel on the disk that a function makes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import nearest
from loaders.quantization.kernels.compare import CHUNK, NONFINITE, WRONG, Group, add_groups, add_slowly, settle
from loaders.quantization.kernels.ggml import decode
from loaders.quantization.kernels.lanes import Array, Lanes, Value, kernel, vector

N, SUPER = 32, 256  # weights in a block; a chunk holds whole blocks
LANES = 16  # weights in a vector, as the decoders return them


def _add(
    lanes: Lanes,
    data: Array,
    x: Array,
    start: Value,
    stop: Value,
    totals: Array,
    values: Callable[[Lanes, Array, Value], list[Value]],
    size: int,
    group: int = N,
) -> Value:
    """Sum the differences of weights [start, stop), blocks of `size` bytes that `values` decodes: see `add_groups`."""

    def of_group(g: Value) -> Group:
        return (lanes.op("mul", g, size),)

    def decoded(at: Value, own: Group) -> list[Value]:
        return values(lanes, data, *own)

    return add_groups(lanes, x, start, stop, ir.Constant(start.type, group), totals, of_group, decoded, in_order=group)


@vector(types.float64)
def _add_q8_0(lanes: Lanes, data: Array, x: Array, start: Value, stop: Value, totals: Array) -> Value:
    return _add(lanes, data, x, start, stop, totals, decode.eight, 34)


@kernel
def _q8_0(data, x, sums):  # type: ignore[no-untyped-def]
    totals = np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        if not settle(_add_q8_0(data, x, start, stop, totals), totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode.q8_0(data[start // N * 34 :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)


@vector(types.float64)
def _add_q4_0(lanes: Lanes, data: Array, x: Array, start: Value, stop: Value, totals: Array) -> Value:
    return _add(lanes, data, x, start, stop, totals, decode.four_centred, 18)


@kernel
def _q4_0(data, x, sums):  # type: ignore[no-untyped-def]
    totals = np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        if not settle(_add_q4_0(data, x, start, stop, totals), totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode.q4_0(data[start // N * 18 :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)


@vector(types.float64)
def _add_q4_1(lanes: Lanes, data: Array, x: Array, start: Value, stop: Value, totals: Array) -> Value:
    return _add(lanes, data, x, start, stop, totals, decode.four_offset, 20)


@kernel
def _q4_1(data, x, sums):  # type: ignore[no-untyped-def]
    totals = np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        if not settle(_add_q4_1(data, x, start, stop, totals), totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode.q4_1(data[start // N * 20 :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)


@vector(types.float64)
def _add_q5_0(lanes: Lanes, data: Array, x: Array, start: Value, stop: Value, totals: Array) -> Value:
    return _add(lanes, data, x, start, stop, totals, decode.five_centred, 22)


@kernel
def _q5_0(data, x, sums):  # type: ignore[no-untyped-def]
    totals = np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        if not settle(_add_q5_0(data, x, start, stop, totals), totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode.q5_0(data[start // N * 22 :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)


@vector(types.float64)
def _add_q5_1(lanes: Lanes, data: Array, x: Array, start: Value, stop: Value, totals: Array) -> Value:
    return _add(lanes, data, x, start, stop, totals, decode.five_offset, 24)


@kernel
def _q5_1(data, x, sums):  # type: ignore[no-untyped-def]
    totals = np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        if not settle(_add_q5_1(data, x, start, stop, totals), totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode.q5_1(data[start // N * 24 :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)


@vector(types.float64)
def _add_tq2_0(lanes: Lanes, data: Array, x: Array, start: Value, stop: Value, totals: Array) -> Value:
    return _add(lanes, data, x, start, stop, totals, decode.four_trits, 66, SUPER)


@kernel
def _tq2_0(data, x, sums):  # type: ignore[no-untyped-def]
    totals = np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        if not settle(_add_tq2_0(data, x, start, stop, totals), totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode.tq2_0(data[start // SUPER * 66 :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)


@vector(types.float64)
def _add_mxfp4(
    lanes: Lanes,
    data: Array,
    x: Array,
    top: Value,
    half: Value,
    floor: Value,
    slope: Value,
    start: Value,
    stop: Value,
    totals: Array,
) -> Value:
    """Sum the differences of weights [start, stop), and tell of those that are not the nearest: see `add_groups`."""
    tops, halves, floors, slopes = (lanes.splat(each, LANES) for each in (top, half, floor, slope))

    def of_group(g: Value) -> Group:
        place = lanes.op("mul", g, 17)
        scale = decode.scale_of_mxfp4(lanes, data, place)
        return place, scale, lanes.b.fmul(scale, tops), lanes.b.fadd(lanes.b.fmul(scale, halves), floors)

    def decoded(at: Value, own: Group) -> list[Value]:
        return decode.four_floating(lanes, data, own[0], own[1])

    def is_off(source: Value, value: Value, own: Group) -> Value:
        return nearest.is_far(lanes, source, value, lanes.b.fneg(own[2]), own[2], own[3], slopes)

    return add_groups(lanes, x, start, stop, ir.Constant(start.type, N), totals, of_group, decoded, is_off, in_order=N)


@kernel
def mxfp4(data, x, top, half, floor, slope, sums):  # type: ignore[no-untyped-def]
    """Do as the others, and hold weights to be the nearest of their codes: see `compare` of mlx/microfloat.py."""
    totals = np.zeros(4, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        largest = _add_mxfp4(data, x, top, half, floor, slope, start, stop, totals)
        is_off = totals[3] != 0
        if not settle(largest, totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode.mxfp4(data[start // N * 17 :], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)
        if is_off and not sums[NONFINITE]:
            sums[WRONG] = 1


COMPARERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "TQ2_0": _tq2_0}
assert np.gcd(CHUNK, SUPER) == SUPER
