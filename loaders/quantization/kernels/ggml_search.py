"""The searches for scales of ggml's K-quants, sixteen sub-blocks side by side.

ggml looks for the scale (and least value) of each sub-block by trying some, and adds its sums in order, so that one
sub-block cannot be spread over vector lanes without changing bytes. Many can stand side by side, a lane each: every
lane does exactly what the C code does, in float32 and in its order. Arrays hold a row of lanes for each weight of a
sub-block: (n, LANES) flat, n = 16 or 32. Sixteen lanes are what AVX2 has registers for: with more, or with all the
weights written out one after another, sums go through memory, and compiling takes seconds.

Source: llama.cpp, ggml/src/ggml-quants.c: make_qkx2_quants (Q2_K, Q4_K, Q5_K), make_q3_quants, make_qx_quants (Q6_K).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, vector

LANES = 16
TOP, SUM_LX, SUM_L2 = range(3)  # rows of the state of Q3_K's search
NOTHING = 1e-15  # a sub-block whose magnitudes are all below is zero (Q3_K, Q6_K)
MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the lowest bits
KIND = ir.VectorType(F32, LANES)
WIDE = ir.VectorType(I32, LANES)


def _place(row: int) -> Value:
    return ir.Constant(ir.IntType(64), row * LANES)


def _row(lanes: Lanes, array: Array, row: int) -> Value:
    return lanes.load(array, _place(row), LANES)


def _put(lanes: Lanes, value: Value, array: Array, row: int) -> None:
    lanes.store(value, array, _place(row))


def _over(lanes: Lanes, rows: range, values: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
    """Repeat values = body(at, *values) for the rows of a sub-block's weights, which begin `at`."""
    return lanes.fold(_place(rows.start), _place(rows.stop), LANES, values, body)


def _number(lanes: Lanes, value: float) -> Value:
    return lanes.const(KIND, value)


def _nearest(lanes: Lanes, v: Value, lowest: int, highest: int) -> Value:
    """The nearest_int of ggml, clamped, as float32. What is not finite or beyond 2^22 comes out as its bits make it."""
    bits = lanes.b.bitcast(lanes.op("fadd", v, MAGIC), WIDE)
    whole = lanes.op("sub", lanes.op("and_", bits, 0x7FFFFF), 0x400000)
    low, high = lanes.const(WIDE, lowest), lanes.const(WIDE, highest)
    whole = lanes.b.select(lanes.b.icmp_signed("<", whole, high), whole, high)
    whole = lanes.b.select(lanes.b.icmp_signed(">", whole, low), whole, low)
    return lanes.b.sitofp(whole, KIND)


def _steps(lanes: Lanes, v: Value, top: int) -> Value:
    """`_nearest` from 0 to `top` for what is finite and small, in fewer operations; NaN becomes 0."""
    raised, least, most = lanes.op("fadd", v, MAGIC), lanes.const(v.type, MAGIC), lanes.const(v.type, MAGIC + top)
    raised = lanes.b.select(_less(lanes, least, raised), raised, least)
    return lanes.op("fsub", lanes.b.select(_less(lanes, raised, most), raised, most), MAGIC)


def _finite(lanes: Lanes, step: Value) -> Value:
    """A step, or 0 for an infinite one: of a sub-block so narrow that ggml's codes all come out as 0, and so here."""
    endless = lanes.b.fcmp_ordered("==", lanes.absolute(step), _number(lanes, math.inf))
    return lanes.b.select(endless, _number(lanes, 0), step)


def _less(lanes: Lanes, a: Value, b: Value) -> Value:
    return lanes.b.fcmp_ordered("<", a, b)


# --- scale and least value


def _weigh(lanes: Lanes, x: Array, weights: Array, n: int, by_square: bool) -> list[Value]:
    """Each weight's importance; the least and the greatest weight, the sums of importances and of what they weigh.

    Weights count by their magnitude, with `by_square` also by the sub-block's root mean square.
    """
    b, zero, mean = lanes.b, _number(lanes, 0), None
    if by_square:

        def add_square(at: Value, total: Value) -> list[Value]:
            v = lanes.load(x, at, LANES)
            return [b.fadd(total, b.fmul(v, v))]

        [squares] = _over(lanes, range(n), [zero], add_square)
        mean = lanes.call(f"llvm.sqrt.v{LANES}f32", KIND, lanes.op("fdiv", squares, n))

    def weigh(at: Value) -> tuple[Value, Value]:
        v = lanes.load(x, at, LANES)
        w = lanes.absolute(v) if mean is None else b.fadd(mean, lanes.absolute(v))
        lanes.store(w, weights, at)
        return v, w

    def extend(at: Value, low: Value, high: Value, sum_w: Value, sum_x: Value) -> list[Value]:
        v, w = weigh(at)
        low, high = b.select(_less(lanes, v, low), v, low), b.select(_less(lanes, high, v), v, high)
        return [low, high, b.fadd(sum_w, w), b.fadd(sum_x, b.fmul(w, v))]

    v, w = weigh(_place(0))
    return _over(lanes, range(1, n), [v, v, w, b.fmul(w, v)], extend)


class _Line:
    """make_qkx2_quants: a scale and a least value for codes from 0 to `top`."""

    def __init__(self, lanes: Lanes, x: Array, weights: Array, codes: Array, n: int, top: int, by_square: bool) -> None:
        self.lanes = lanes
        self._arrays = x, weights, codes
        self._n = n
        self._top = top
        self._by_square = by_square
        low, self._high, self._sum_w, self._sum_x = _weigh(lanes, x, weights, n, by_square)
        self._first_low = lanes.b.select(_less(lanes, _number(lanes, 0), low), _number(lanes, 0), low)

    def search(self, first: float, tries: int, scales: Array, lows: Array) -> None:
        """Take the best of the first guess and of `tries` numbers of steps, 0.1 apart, from top + `first` on."""
        lanes, b, number = self.lanes, self.lanes.b, ir.IntType(64)
        step = b.fdiv(_number(lanes, self._top), b.fsub(self._high, self._first_low))
        scale, step = b.fdiv(_number(lanes, 1), step), _finite(lanes, step)
        self._put_codes(step, self._first_low)
        begun = [scale, self._first_low, self._misfit(scale, self._first_low), step, self._first_low]

        def improve(index: Value, *best: Value) -> list[Value]:
            reach = lanes.op("fmul", b.sitofp(index, F32), float(np.float32(0.1)))
            return self._try(lanes.op("fadd", lanes.op("fadd", reach, first), self._top), list(best))

        scale, low, _, step, start = lanes.fold(ir.Constant(number, 0), ir.Constant(number, tries), 1, begun, improve)
        is_flat = b.fcmp_ordered("==", self._high, self._first_low)  # one value: scale and codes are 0
        self._put_codes(b.select(is_flat, _number(lanes, 0), step), start)
        _put(lanes, b.select(is_flat, _number(lanes, 0), scale), scales, 0)
        _put(lanes, b.select(is_flat, self._first_low, low), lows, 0)

    def _try(self, reach: Value, best: list[Value]) -> list[Value]:
        """Codes from the present least value in steps of (high - low) / reach; the best line through them, or before.

        What is best is a scale, a least value, their misfit, and the step and least value that codes come from.
        """
        lanes, b, zero = self.lanes, self.lanes.b, _number(self.lanes, 0)
        low, sum_w, sum_x = best[1], self._sum_w, self._sum_x
        step = _finite(lanes, b.fdiv(lanes.splat(reach, LANES), b.fsub(self._high, low)))
        self._put_codes(step, low)
        sum_l, sum_l2, sum_xl = self._sums()
        d = b.fsub(b.fmul(sum_w, sum_l2), b.fmul(sum_l, sum_l))
        scale = b.fdiv(b.fsub(b.fmul(sum_w, sum_xl), b.fmul(sum_x, sum_l)), d)
        least = b.fdiv(b.fsub(b.fmul(sum_l2, sum_x), b.fmul(sum_l, sum_xl)), d)
        above = _less(lanes, zero, least)
        scale = b.select(above, b.fdiv(sum_xl, sum_l2), scale)
        least = b.select(above, zero, least)
        error = self._misfit(scale, least)
        is_better = b.and_(_less(lanes, zero, d), _less(lanes, error, best[2]))
        tried = (scale, least, error, step, low)
        return [b.select(is_better, new, old) for new, old in zip(tried, best, strict=True)]

    def _put_codes(self, step: Value, low: Value) -> None:
        """The codes nearest (x - low) * step."""
        lanes, b, (x, _, codes) = self.lanes, self.lanes.b, self._arrays

        def put(at: Value) -> list[Value]:
            steps = b.fmul(step, b.fsub(lanes.load(x, at, LANES), low))
            lanes.store(_steps(lanes, steps, self._top), codes, at)
            return []

        _over(lanes, range(self._n), [], put)

    def _sums(self) -> list[Value]:
        """The weighted sums of code, of its square, and of code times x.

        A loop of its own: beside the making of codes, what waits for its turn is more than a CPU looks ahead.
        """
        lanes, b = self.lanes, self.lanes.b

        def add(at: Value, *sums: Value) -> list[Value]:
            v, w, code = (lanes.load(array, at, LANES) for array in self._arrays)
            weighted = b.fmul(w, code)
            return [*map(b.fadd, sums, (weighted, b.fmul(weighted, code), b.fmul(weighted, v)))]

        return _over(lanes, range(self._n), [_number(lanes, 0)] * 3, add)

    def _misfit(self, scale: Value, low: Value) -> Value:
        """The weighted sum of what the codes' line misses, or of its squares."""
        lanes, b = self.lanes, self.lanes.b

        def add(at: Value, error: Value) -> list[Value]:
            v, w, code = (lanes.load(array, at, LANES) for array in self._arrays)
            missed = b.fsub(b.fadd(b.fmul(scale, code), low), v)
            missed = b.fmul(missed, missed) if self._by_square else lanes.absolute(missed)
            return [b.fadd(error, b.fmul(w, missed))]

        [error] = _over(lanes, range(self._n), [_number(lanes, 0)], add)
        return error


@vector(types.void)
def search_q4(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array, lows: Array) -> None:
    _Line(lanes, x, weights, codes, 32, 15, True).search(-1, 21, scales, lows)


@vector(types.void)
def search_q5(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array, lows: Array) -> None:
    _Line(lanes, x, weights, codes, 32, 31, True).search(-0.5, 16, scales, lows)


@vector(types.void)
def search_q2(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array, lows: Array) -> None:
    _Line(lanes, x, weights, codes, 16, 3, False).search(-0.5, 16, scales, lows)


# --- a scale alone


def _extreme(lanes: Lanes, x: Array, n: int) -> list[Value]:
    """The weight of greatest magnitude, the first of equals, and its magnitude."""

    def larger(at: Value, top: Value, size: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        magnitude = lanes.absolute(v)
        is_larger = _less(lanes, size, magnitude)
        return [lanes.b.select(is_larger, v, top), lanes.b.select(is_larger, magnitude, size)]

    return _over(lanes, range(n), [_number(lanes, 0)] * 2, larger)


def _add_fit(lanes: Lanes, v: Value, code: Value, sums: tuple[Value, Value]) -> list[Value]:
    """Sums of x^2 * x * code and x^2 * code * code, and one weight more."""
    w = lanes.b.fmul(v, v)
    terms = lanes.b.fmul(lanes.b.fmul(w, v), code), lanes.b.fmul(lanes.b.fmul(w, code), code)
    return [lanes.b.fadd(total, term) for total, term in zip(sums, terms, strict=True)]


def _fit_q6(lanes: Lanes, x: Array, step: Value) -> list[Value]:
    """The sums of `_add_fit`."""

    def add(at: Value, *sums: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        return _add_fit(lanes, v, _nearest(lanes, lanes.b.fmul(step, v), -32, 31), sums)

    return _over(lanes, range(16), [_number(lanes, 0)] * 2, add)


@vector(types.void)
def search_q6(lanes: Lanes, x: Array, codes: Array, scales: Array) -> None:
    """make_qx_quants(16, 32, rmse_type 1): steps of the greatest magnitude / 32, and of 18 other numbers about it.

    Codes are from 0 to 63; a sub-block of nothing has scale and codes 0.
    """
    b, zero, number = lanes.b, _number(lanes, 0), ir.IntType(64)
    top, size = _extreme(lanes, x, 16)
    step = b.fdiv(_number(lanes, -32), top)
    sum_lx, sum_l2 = _fit_q6(lanes, x, step)
    scale = b.select(b.fcmp_unordered("!=", sum_l2, zero), b.fdiv(sum_lx, sum_l2), zero)

    def improve(index: Value, *best: Value) -> list[Value]:
        """What is best is a scale, what is to be exceeded, and a step."""
        reach = lanes.op("fadd", lanes.op("fmul", b.sitofp(index, F32), float(np.float32(0.1))), 32)
        step = b.fdiv(lanes.splat(b.fneg(reach), LANES), top)
        sum_lx, sum_l2 = _fit_q6(lanes, x, step)
        exceeds = _less(lanes, b.fmul(best[1], sum_l2), b.fmul(sum_lx, sum_lx))
        is_other = lanes.splat(b.icmp_signed("!=", index, ir.Constant(number, 0)), LANES)
        is_better = b.and_(b.and_(_less(lanes, zero, sum_l2), exceeds), is_other)
        scale = b.fdiv(sum_lx, sum_l2)
        tried = (scale, b.fmul(scale, sum_lx), step)
        return [b.select(is_better, new, old) for new, old in zip(tried, best, strict=True)]

    begun = [scale, b.fmul(scale, sum_lx), step]
    scale, _, step = lanes.fold(ir.Constant(number, -9), ir.Constant(number, 10), 1, begun, improve)
    is_nothing = _less(lanes, size, _number(lanes, NOTHING))

    def put(at: Value) -> list[Value]:
        found = _nearest(lanes, b.fmul(step, lanes.load(x, at, LANES)), -32, 31)
        lanes.store(b.select(is_nothing, zero, lanes.op("fadd", found, 32)), codes, at)
        return []

    _over(lanes, range(16), [], put)
    _put(lanes, b.select(is_nothing, zero, scale), scales, 0)


@vector(types.void)
def begin_q3(lanes: Lanes, x: Array, codes: Array, state: Array) -> None:
    """make_q3_quants(16, 4): codes -4 to 3 by the weight of greatest magnitude, and their sums."""
    b = lanes.b
    top, size = _extreme(lanes, x, 16)
    _put(lanes, size, state, TOP)
    step = b.fdiv(_number(lanes, -4), top)

    def add(at: Value, *sums: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        code = _nearest(lanes, b.fmul(step, v), -4, 3)
        lanes.store(code, codes, at)
        return _add_fit(lanes, v, code, sums)

    sum_lx, sum_l2 = _over(lanes, range(16), [_number(lanes, 0)] * 2, add)
    _put(lanes, sum_lx, state, SUM_LX)
    _put(lanes, sum_l2, state, SUM_L2)


@vector(types.int32)
def improve_q3(lanes: Lanes, x: Array, codes: Array, state: Array) -> Value:
    """Once over the weights: each takes the code that fits best beside the others'. Gives 0 if none changed."""
    b, zero = lanes.b, _number(lanes, 0)

    def improve(at: Value, sum_lx: Value, sum_l2: Value, changed: Value) -> list[Value]:
        v, code = lanes.load(x, at, LANES), lanes.load(codes, at, LANES)
        w = b.fmul(v, v)
        other_lx = b.fsub(sum_lx, b.fmul(b.fmul(w, v), code))
        other_l2 = b.fsub(sum_l2, b.fmul(b.fmul(w, code), code))
        found = _nearest(lanes, b.fdiv(b.fmul(v, other_l2), other_lx), -4, 3)
        new_lx = b.fadd(other_lx, b.fmul(b.fmul(w, v), found))
        new_l2 = b.fadd(other_l2, b.fmul(b.fmul(w, found), found))
        is_better = _less(lanes, b.fmul(b.fmul(sum_lx, sum_lx), new_l2), b.fmul(b.fmul(new_lx, new_lx), sum_l2))
        is_other = b.fcmp_unordered("!=", found, code)
        taken = b.and_(b.and_(_less(lanes, zero, other_lx), is_other), b.and_(_less(lanes, zero, new_l2), is_better))
        better = b.select(taken, found, code)
        lanes.store(better, codes, at)
        sum_lx, sum_l2 = b.select(taken, new_lx, sum_lx), b.select(taken, new_l2, sum_l2)
        return [sum_lx, sum_l2, b.or_(changed, b.xor(*(b.bitcast(value, WIDE) for value in (better, code))))]

    begun = [_row(lanes, state, SUM_LX), _row(lanes, state, SUM_L2), lanes.const(WIDE, 0)]
    sum_lx, sum_l2, changed = _over(lanes, range(16), begun, improve)
    _put(lanes, sum_lx, state, SUM_LX)
    _put(lanes, sum_l2, state, SUM_L2)
    return lanes.reduce("or", changed)


@vector(types.void)
def end_q3(lanes: Lanes, codes: Array, state: Array, scales: Array) -> None:
    """Codes from 0 to 7; a sub-block of nothing has scale and codes 0."""
    b, zero = lanes.b, _number(lanes, 0)
    is_nothing = _less(lanes, _row(lanes, state, TOP), _number(lanes, NOTHING))

    def shift(at: Value) -> list[Value]:
        code = lanes.op("fadd", lanes.load(codes, at, LANES), 4)
        lanes.store(b.select(is_nothing, zero, code), codes, at)
        return []

    _over(lanes, range(16), [], shift)
    sum_lx, sum_l2 = _row(lanes, state, SUM_LX), _row(lanes, state, SUM_L2)
    scale = b.select(_less(lanes, zero, sum_l2), b.fdiv(sum_lx, sum_l2), zero)
    _put(lanes, b.select(is_nothing, zero, scale), scales, 0)


# --- codes for the scales as they are stored


def _finish(
    lanes: Lanes, x: Array, codes: Array, scales: Array, lows: Array, out: Array, n: int, limits: tuple[int, int, int]
) -> None:
    """Codes (n, LANES), uint8: nearest((x + low) / scale) between limits, plus a shift; where scale is 0, the codes."""
    scale, low = _row(lanes, scales, 0), _row(lanes, lows, 0)
    is_kept = lanes.b.fcmp_ordered("==", scale, _number(lanes, 0))
    lowest, highest, shift = limits

    def code(at: Value) -> list[Value]:
        v = lanes.b.fdiv(lanes.b.fadd(lanes.load(x, at, LANES), low), scale)
        found = lanes.op("fadd", _nearest(lanes, v, lowest, highest), shift)
        taken = lanes.b.fptosi(lanes.b.select(is_kept, lanes.load(codes, at, LANES), found), WIDE)
        lanes.store(lanes.b.trunc(taken, ir.VectorType(I8, LANES)), out, at)
        return []

    _over(lanes, range(n), [], code)


@vector(types.void)
def finish_q2(lanes: Lanes, x: Array, codes: Array, scales: Array, lows: Array, out: Array) -> None:
    _finish(lanes, x, codes, scales, lows, out, 16, (0, 3, 0))


@vector(types.void)
def finish_q3(lanes: Lanes, x: Array, codes: Array, scales: Array, lows: Array, out: Array) -> None:
    _finish(lanes, x, codes, scales, lows, out, 16, (-4, 3, 4))


@vector(types.void)
def finish_q4(lanes: Lanes, x: Array, codes: Array, scales: Array, lows: Array, out: Array) -> None:
    _finish(lanes, x, codes, scales, lows, out, 32, (0, 15, 0))


@vector(types.void)
def finish_q5(lanes: Lanes, x: Array, codes: Array, scales: Array, lows: Array, out: Array) -> None:
    _finish(lanes, x, codes, scales, lows, out, 32, (0, 31, 0))


@vector(types.void)
def finish_q6(lanes: Lanes, x: Array, codes: Array, scales: Array, lows: Array, out: Array) -> None:
    _finish(lanes, x, codes, scales, lows, out, 16, (-32, 31, 32))
