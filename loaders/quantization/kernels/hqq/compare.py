"""HQQ's groups compared with the weights that they were made of, in one call a range, and held to be the nearest codes.

Up to four bits, where the CPU looks up sixteen floats at once, a group's values are decoded once and looked up; else
each code is decoded in registers. Either way values are those of decode.py, and sums those of kernels/compare.py, the
same as by way of a whole decoded range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.compare import CHUNK, NONFINITE, WRONG, Group, add_groups, add_slowly, settle
from loaders.quantization.kernels.hqq.decode import codes_at, decode_groups, ends, values_of
from loaders.quantization.kernels.lanes import I32, Array, Lanes, Value, host_has, inlined, kernel, vector
from loaders.quantization.kernels.nearest import is_far

LANES = 16


def _adder(bits: int) -> Any:
    """Return what sums the differences of whole groups whose codes have up to `bits` bits: see `compare.add_groups`."""

    @vector(types.float64)
    def add(
        lanes: Lanes, x: Array, codes: Array, shift: Value, mask: Value, size: Value, scales: Array, zeros: Array,
        low: Array, high: Array, half: Array, slope: Value, stop: Value, totals: Array,
    ) -> Value:  # fmt: skip
        growth, is_looked_up = lanes.splat(slope, LANES), bits <= 4 and host_has("avx2")

        def in_all(array: Array, g: Value) -> Value:
            return lanes.shuffle(lanes.floats(array, g, 1), [0] * LANES)

        def of_group(g: Value) -> Group:
            scale, zero = in_all(scales, g), in_all(zeros, g)
            if is_looked_up:
                every = lanes.const(ir.VectorType(I32, LANES), range(LANES))
                scale = values_of(lanes, every, scale, zero, scales)
            return scale, zero, in_all(low, g), in_all(high, g), in_all(half, g)

        def decoded(at: Value, own: Group) -> list[Value]:
            found = codes_at(lanes, codes, at, shift, mask, LANES)
            if is_looked_up:
                return [lanes.looked_up(own[0], found)]
            return [values_of(lanes, found, own[0], own[1], scales)]

        def is_off(source: Value, value: Value, own: Group) -> Value:
            return is_far(lanes, source, value, own[2], own[3], own[4], growth)

        start = ir.Constant(stop.type, 0)
        return add_groups(lanes, x, start, stop, size, totals, of_group, decoded, is_off, in_order=LANES)

    return add


@inlined
def _compare(x, codes, shift, mask, scales, zeros, size, rounding, room, sums, add):  # type: ignore[no-untyped-def]
    totals = np.zeros(4, np.float64)
    low, high, half = (
        np.empty(CHUNK // size, np.float32), np.empty(CHUNK // size, np.float32), np.empty(CHUNK // size, np.float32)
    )  # fmt: skip
    growth, floor, slope = room
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        weights, items, first, last = x[start:stop], codes[start:stop], start // size, stop // size
        own, beside = scales[first:last], zeros[first:last]
        ends(own, beside, np.float32(mask), *rounding, low, high, half)
        for g in range(own.size):
            half[g] = half[g] * growth + floor
        largest = add(weights, items, shift, mask, size, own, beside, low, high, half, slope, stop - start, totals)
        is_off = totals[3] != 0
        if not settle(largest, totals, sums):
            decoded = np.empty(stop - start, np.float32)
            decode_groups(items, shift, mask, own, beside, size, decoded)
            add_slowly(weights, decoded, 0, stop - start, sums)
        if is_off and not sums[NONFINITE]:  # a NaN may spoil the scale of its whole group: bounds by it say nothing
            sums[WRONG] = 1


_add_few, _add_many = _adder(4), _adder(8)


@kernel
def _few(x, codes, shift, mask, scales, zeros, size, rounding, room, sums):  # type: ignore[no-untyped-def]
    _compare(x, codes, shift, mask, scales, zeros, size, rounding, room, sums, _add_few)


@kernel
def _many(x, codes, shift, mask, scales, zeros, size, rounding, room, sums):  # type: ignore[no-untyped-def]
    _compare(x, codes, shift, mask, scales, zeros, size, rounding, room, sums, _add_many)


def is_made_for(size: int) -> bool:
    """Whether groups of `size` weights can be compared: a chunk holds whole ones, and they hold whole vectors."""
    return size % LANES == 0 and CHUNK % size == 0


def compare_rows(
    x: np.ndarray, codes: np.ndarray, shift: int, mask: int, scales: np.ndarray, zeros: np.ndarray,
    rounding: tuple[np.float32, ...], room: tuple[np.float32, ...], sums: np.ndarray,
) -> None:  # fmt: skip
    """Add the differences of raw weights and of what `decode_rows` makes of the rest to `sums`.

    x: (n,), as `kernel_input` gives it; the rest as for `decode_rows`. `rounding` is what `ends` takes, in its order:
    its rounding, least and room; `room` is `grid.room_terms`.
    """
    compare = _few if mask < LANES else _many
    compare(x, codes, np.int32(shift), np.int32(mask), scales, zeros, x.size // scales.size, rounding, room, sums)
