"""The search for a scale and a least value: make_qkx2_quants (Q2_K, Q4_K, Q5_K), for LANES sub-blocks at once.

With an importance matrix it is make_qkx3_quants, for Q4_1 and Q5_1 too: the same by other importances, and more steps.
For why and how sub-blocks stand side by side, see kernels/ggml/search.py.

Source: llama.cpp, ggml/src/ggml-quants.c, make_qkx2_quants, make_qkx3_quants.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.ggml.search import (
    KIND,
    LANES,
    TENTH,
    in_all,
    is_less,
    nearest_of,
    over_rows,
    place_of,
    put_row,
)
from loaders.quantization.kernels.lanes import F32, Array, Lanes, Value, vector

Kind = Literal["magnitude", "mean", "given"]
GIVEN = float(np.float32(-0.9)), float(np.float32(0.05)), 37  # make_qkx3_quants' rmin, rdelta and nstep + 1


def _finite(lanes: Lanes, step: Value) -> Value:
    """Replace an infinite step by 0. A sub-block is then so narrow that all of ggml's codes come out as 0.

    In ggml the bits of an infinity come out of nearest_int as -2^22, which is clamped to 0; here they would give `top`.
    """
    endless = lanes.b.fcmp_ordered("==", lanes.absolute(step), in_all(lanes, math.inf))
    return lanes.b.select(endless, in_all(lanes, 0), step)


def _weigh(lanes: Lanes, x: Array, weights: Array, n: int, kind: Kind) -> list[Value]:
    """Store each weight's importance in `weights`; return the least and greatest weight, and two sums.

    The sums are those of the importances w and of w * x. By "magnitude" (Q2_K) the importance is |x|, by "mean" (Q4_K,
    Q5_K) the sub-block's root mean square is added: av_x + fabsf(x[l]) in quantize_row_q4_K_ref. "given" ones are in
    `weights` already.
    """
    b, zero, mean = lanes.b, in_all(lanes, 0), None
    if kind == "mean":

        def add_square(at: Value, total: Value) -> list[Value]:
            v = lanes.load(x, at, LANES)
            return [b.fadd(total, b.fmul(v, v))]

        [squares] = over_rows(lanes, range(n), [zero], add_square)
        mean = lanes.call(f"llvm.sqrt.v{LANES}f32", KIND, lanes.op("fdiv", squares, n))

    def weigh(at: Value) -> tuple[Value, Value]:
        v = lanes.load(x, at, LANES)
        if kind == "given":
            return v, lanes.load(weights, at, LANES)
        w = lanes.absolute(v) if mean is None else b.fadd(mean, lanes.absolute(v))
        lanes.store(w, weights, at)
        return v, w

    def extend(at: Value, low: Value, high: Value, sum_w: Value, sum_x: Value) -> list[Value]:
        v, w = weigh(at)
        low, high = b.select(is_less(lanes, v, low), v, low), b.select(is_less(lanes, high, v), v, high)
        return [low, high, b.fadd(sum_w, w), b.fadd(sum_x, b.fmul(w, v))]

    v, w = weigh(place_of(0))
    return over_rows(lanes, range(1, n), [v, v, w, b.fmul(w, v)], extend)


class _Line:
    """make_qkx2_quants for rows of lanes: a line x = scale * code + low through the weights, codes from 0 to `top`."""

    def __init__(self, lanes: Lanes, x: Array, weights: Array, codes: Array, n: int, top: int, kind: Kind) -> None:
        self.lanes = lanes
        self._arrays = x, weights, codes
        self._n = n
        self._top = top
        self._by_square = kind != "magnitude"
        low, self._high, self._sum_w, self._sum_x = _weigh(lanes, x, weights, n, kind)
        self._first_low = lanes.b.select(is_less(lanes, in_all(lanes, 0), low), in_all(lanes, 0), low)

    def search(self, first: float, delta: float, tries: int, scales: Array, lows: Array) -> None:
        """Store the best of the first guess and of `tries` lines, by top + first + delta * i steps from low to high.

        `first` and `delta` are make_qkx2_quants' rmin and rdelta, and `tries` its nstep + 1.
        """
        lanes, b, number = self.lanes, self.lanes.b, ir.IntType(64)
        step = b.fdiv(in_all(lanes, self._top), b.fsub(self._high, self._first_low))
        scale, step = b.fdiv(in_all(lanes, 1), step), _finite(lanes, step)
        self._put_codes(step, self._first_low)
        begun = [scale, self._first_low, self._misfit(scale, self._first_low), step, self._first_low]

        def improve(index: Value, *best: Value) -> list[Value]:
            reach = lanes.op("fmul", b.sitofp(index, F32), delta)
            return self._try(lanes.op("fadd", lanes.op("fadd", reach, first), self._top), list(best))

        # ggml keeps the codes of the best line; here its step and start are kept, and the codes made again at the end.
        scale, low, _, step, start = lanes.fold(ir.Constant(number, 0), ir.Constant(number, tries), 1, begun, improve)
        is_flat = b.fcmp_ordered("==", self._high, self._first_low)  # one value: scale and codes are 0
        self._put_codes(b.select(is_flat, in_all(lanes, 0), step), start)
        put_row(lanes, b.select(is_flat, in_all(lanes, 0), scale), scales, 0)
        put_row(lanes, b.select(is_flat, self._first_low, low), lows, 0)

    def _try(self, reach: Value, best: list[Value]) -> list[Value]:
        """Fit a line to the codes of steps of (high - low) / reach from the best low on; return it if it is better.

        `best` is a scale, a least value, their misfit, and the step and least value from which the codes come. As in
        ggml, a better low moves the grid of all later tries.
        """
        lanes, b, zero = self.lanes, self.lanes.b, in_all(self.lanes, 0)
        low, sum_w, sum_x = best[1], self._sum_w, self._sum_x
        step = _finite(lanes, b.fdiv(lanes.splat(reach, LANES), b.fsub(self._high, low)))
        self._put_codes(step, low)
        sum_l, sum_l2, sum_xl = self._sums()
        d = b.fsub(b.fmul(sum_w, sum_l2), b.fmul(sum_l, sum_l))
        scale = b.fdiv(b.fsub(b.fmul(sum_w, sum_xl), b.fmul(sum_x, sum_l)), d)
        least = b.fdiv(b.fsub(b.fmul(sum_l2, sum_x), b.fmul(sum_l, sum_xl)), d)
        above = is_less(lanes, zero, least)
        scale = b.select(above, b.fdiv(sum_xl, sum_l2), scale)
        least = b.select(above, zero, least)
        error = self._misfit(scale, least)
        is_better = b.and_(is_less(lanes, zero, d), is_less(lanes, error, best[2]))
        tried = (scale, least, error, step, low)
        return [b.select(is_better, new, old) for new, old in zip(tried, best, strict=True)]

    def _put_codes(self, step: Value, low: Value) -> None:
        """Store the codes nearest to (x - low) * step."""
        lanes, b, (x, _, codes) = self.lanes, self.lanes.b, self._arrays

        def put(at: Value) -> list[Value]:
            steps = b.fmul(step, b.fsub(lanes.load(x, at, LANES), low))
            lanes.store(nearest_of(lanes, steps, 0, self._top), codes, at)
            return []

        over_rows(lanes, range(self._n), [], put)

    def _sums(self) -> list[Value]:
        """Return the weighted sums of code, of its square, and of code times x.

        This is a loop of its own, apart from the one that makes codes: together, the chains of dependent operations
        are longer than a CPU looks ahead, and it would wait for them.
        """
        lanes, b = self.lanes, self.lanes.b

        def add(at: Value, *sums: Value) -> list[Value]:
            v, w, code = (lanes.load(array, at, LANES) for array in self._arrays)
            weighted = b.fmul(w, code)
            return [*map(b.fadd, sums, (weighted, b.fmul(weighted, code), b.fmul(weighted, v)))]

        return over_rows(lanes, range(self._n), [in_all(lanes, 0)] * 3, add)

    def _misfit(self, scale: Value, low: Value) -> Value:
        """Return the weighted sum of the line's errors: of their squares with `by_square`, else of their magnitudes."""
        lanes, b = self.lanes, self.lanes.b

        def add(at: Value, error: Value) -> list[Value]:
            v, w, code = (lanes.load(array, at, LANES) for array in self._arrays)
            missed = b.fsub(b.fadd(b.fmul(scale, code), low), v)
            missed = b.fmul(missed, missed) if self._by_square else lanes.absolute(missed)
            return [b.fadd(error, b.fmul(w, missed))]

        [error] = over_rows(lanes, range(self._n), [in_all(lanes, 0)], add)
        return error


@vector(types.void)
def search_q4(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array, lows: Array) -> None:
    _Line(lanes, x, weights, codes, 32, 15, "mean").search(-1, TENTH, 21, scales, lows)


@vector(types.void)
def search_q5(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array, lows: Array) -> None:
    _Line(lanes, x, weights, codes, 32, 31, "mean").search(-0.5, TENTH, 16, scales, lows)


@vector(types.void)
def search_q2(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array, lows: Array) -> None:
    _Line(lanes, x, weights, codes, 16, 3, "magnitude").search(-0.5, TENTH, 16, scales, lows)


# --- by given importances


@vector(types.void)
def search_16_3(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array, lows: Array) -> None:
    _Line(lanes, x, weights, codes, 16, 3, "given").search(*GIVEN, scales, lows)


@vector(types.void)
def search_32_15(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array, lows: Array) -> None:
    _Line(lanes, x, weights, codes, 32, 15, "given").search(*GIVEN, scales, lows)


@vector(types.void)
def search_32_31(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array, lows: Array) -> None:
    _Line(lanes, x, weights, codes, 32, 31, "given").search(*GIVEN, scales, lows)
