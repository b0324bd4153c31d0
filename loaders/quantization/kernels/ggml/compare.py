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

from loaders.quantization.kernels.compare import CHUNK, Group, add_groups, add_slowly, settle
from loaders.quantization.kernels.ggml import decode, super_blocks
from loaders.quantization.kernels.ggml.super_blocks import SUPER, SuperBlock
from loaders.quantization.kernels.lanes import Array, Lanes, Value, inlined, kernel, vector

N = 32  # weights in a block; a chunk holds whole blocks


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


def _ternary(block: SuperBlock) -> Any:
    def values(lanes: Lanes, data: Array, at: Value) -> list[Value]:
        return block.weights(lanes, data, at, block.scales(lanes, data, at))

    return _adder(values, block.size, SUPER)


_add_tq1_0, _add_tq2_0 = _ternary(super_blocks.TQ1_0), _ternary(super_blocks.TQ2_0)


@kernel
def _tq1_0(data, x, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, sums, _add_tq1_0, super_blocks.tq1_0, 54, SUPER)


@kernel
def _tq2_0(data, x, sums):  # type: ignore[no-untyped-def]
    _compare(data, x, sums, _add_tq2_0, super_blocks.tq2_0, 66, SUPER)


COMPARERS = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0,
}  # fmt: skip
assert np.gcd(CHUNK, SUPER) == SUPER
