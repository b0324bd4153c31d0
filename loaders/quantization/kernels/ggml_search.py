"""The searches for scales of ggml's K-quants, thirty-two sub-blocks side by side.

ggml looks for the scale (and least value) of each sub-block by trying some, and adds its sums in order, so that one
sub-block cannot be spread over vector lanes without changing bytes. Many can stand side by side, a lane each: every
lane does exactly what the C code does, in float32 and in its order. Arrays hold a row of lanes for each weight of a
sub-block: (n, LANES) flat, n = 16 or 32.

Source: llama.cpp, ggml/src/ggml-quants.c: make_qkx2_quants (Q2_K, Q4_K, Q5_K), make_q3_quants, make_qx_quants (Q6_K).
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, vector

LANES = 32
# rows of the state of a search
SCALE, LOW, ERROR, STEP, FROM, HIGH, SUM_W, SUM_X, FIRST_LOW, STATE_ROWS = range(10)
NOTHING = 1e-15  # a sub-block whose magnitudes are all below is zero (Q3_K, Q6_K)
MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the lowest bits
KIND = ir.VectorType(F32, LANES)
WIDE = ir.VectorType(I32, LANES)


def _row(lanes: Lanes, array: Array, row: int) -> Value:
    return lanes.load(array, ir.Constant(ir.IntType(64), row * LANES), LANES)


def _put(lanes: Lanes, value: Value, array: Array, row: int) -> None:
    lanes.store(value, array, ir.Constant(ir.IntType(64), row * LANES))


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
    """`_nearest` from 0 to `top` for what is finite and small, in fewer operations."""
    whole = lanes.op("fsub", lanes.op("fadd", v, MAGIC), MAGIC)
    zero, high = _number(lanes, 0), _number(lanes, top)
    whole = lanes.b.select(_less(lanes, zero, whole), whole, zero)
    return lanes.b.select(_less(lanes, whole, high), whole, high)


def _finite(lanes: Lanes, step: Value) -> Value:
    """A step, or 0 for an infinite one: of a sub-block so narrow that ggml's codes all come out as 0, and so here."""
    endless = lanes.b.fcmp_ordered("==", lanes.absolute(step), _number(lanes, math.inf))
    return lanes.b.select(endless, _number(lanes, 0), step)


def _less(lanes: Lanes, a: Value, b: Value) -> Value:
    return lanes.b.fcmp_ordered("<", a, b)


# --- scale and least value: make_qkx2_quants


def _misfit(lanes: Lanes, v: Value, w: Value, code: Value, scale: Value, low: Value, by_square: bool) -> Value:
    difference = lanes.b.fsub(lanes.b.fadd(lanes.b.fmul(scale, code), low), v)
    size = lanes.b.fmul(difference, difference) if by_square else lanes.absolute(difference)
    return lanes.b.fmul(w, size)


def _begin(lanes: Lanes, x: Array, weights: Array, state: Array, n: int, top: int, by_square: bool) -> None:
    """The first guess: from the least weight (at most 0) to the greatest, in `top` steps.

    Weights count by their magnitude, with `by_square` also by the sub-block's root mean square.
    """
    b, zero = lanes.b, _number(lanes, 0)
    mean = None
    if by_square:
        squares = zero
        for i in range(n):
            v = _row(lanes, x, i)
            squares = b.fadd(squares, b.fmul(v, v))
        mean = lanes.call(f"llvm.sqrt.v{LANES}f32", KIND, lanes.op("fdiv", squares, n))
    low = high = sum_w = sum_x = zero
    for i in range(n):
        v = _row(lanes, x, i)
        w = lanes.absolute(v) if mean is None else b.fadd(mean, lanes.absolute(v))
        _put(lanes, w, weights, i)
        if i == 0:
            low, high, sum_w, sum_x = v, v, w, b.fmul(w, v)
            continue
        low, high = b.select(_less(lanes, v, low), v, low), b.select(_less(lanes, high, v), v, high)
        sum_w, sum_x = b.fadd(sum_w, w), b.fadd(sum_x, b.fmul(w, v))
    low = b.select(_less(lanes, zero, low), zero, low)
    step = b.fdiv(_number(lanes, top), b.fsub(high, low))
    scale = b.fdiv(_number(lanes, 1), step)
    error, step = zero, _finite(lanes, step)
    for i in range(n):
        v = _row(lanes, x, i)
        code = _steps(lanes, b.fmul(step, b.fsub(v, low)), top)
        error = b.fadd(error, _misfit(lanes, v, _row(lanes, weights, i), code, scale, low, by_square))
    rows = {SCALE: scale, LOW: low, ERROR: error, STEP: step, FROM: low, HIGH: high, SUM_W: sum_w, SUM_X: sum_x}
    for row, value in (rows | {FIRST_LOW: low}).items():
        _put(lanes, value, state, row)


def _try(
    lanes: Lanes, x: Array, weights: Array, codes: Array, state: Array, reach: Value, n: int, top: int, by_square: bool
) -> None:
    """Codes from the present least value in steps of (high - low) / reach; the best line through them; is it better?"""
    b, zero = lanes.b, _number(lanes, 0)
    low, high, sum_w, sum_x = (_row(lanes, state, row) for row in (LOW, HIGH, SUM_W, SUM_X))
    step = _finite(lanes, b.fdiv(lanes.splat(reach, LANES), b.fsub(high, low)))
    sum_l = sum_l2 = sum_xl = zero
    for i in range(n):
        v = _row(lanes, x, i)
        code = _steps(lanes, b.fmul(step, b.fsub(v, low)), top)
        _put(lanes, code, codes, i)
        weighted = b.fmul(_row(lanes, weights, i), code)
        sum_l = b.fadd(sum_l, weighted)
        sum_l2 = b.fadd(sum_l2, b.fmul(weighted, code))
        sum_xl = b.fadd(sum_xl, b.fmul(weighted, v))
    d = b.fsub(b.fmul(sum_w, sum_l2), b.fmul(sum_l, sum_l))
    scale = b.fdiv(b.fsub(b.fmul(sum_w, sum_xl), b.fmul(sum_x, sum_l)), d)
    least = b.fdiv(b.fsub(b.fmul(sum_l2, sum_x), b.fmul(sum_l, sum_xl)), d)
    above = _less(lanes, zero, least)
    scale = b.select(above, b.fdiv(sum_xl, sum_l2), scale)
    least = b.select(above, zero, least)
    error = zero
    for i in range(n):
        terms = (_row(lanes, x, i), _row(lanes, weights, i), _row(lanes, codes, i))
        error = b.fadd(error, _misfit(lanes, *terms, scale, least, by_square))
    is_better = b.and_(_less(lanes, zero, d), _less(lanes, error, _row(lanes, state, ERROR)))
    for row, value in ((SCALE, scale), (LOW, least), (ERROR, error), (STEP, step), (FROM, low)):
        _put(lanes, b.select(is_better, value, _row(lanes, state, row)), state, row)


def _end(lanes: Lanes, x: Array, codes: Array, state: Array, n: int, top: int) -> None:
    """The codes of what was found; a sub-block of one value has scale and codes 0."""
    b, zero = lanes.b, _number(lanes, 0)
    step, start, low = (_row(lanes, state, row) for row in (STEP, FROM, FIRST_LOW))
    is_flat = b.fcmp_ordered("==", _row(lanes, state, HIGH), low)
    for i in range(n):
        code = _steps(lanes, b.fmul(step, b.fsub(_row(lanes, x, i), start)), top)
        _put(lanes, b.select(is_flat, zero, code), codes, i)
    _put(lanes, b.select(is_flat, zero, _row(lanes, state, SCALE)), state, SCALE)
    _put(lanes, b.select(is_flat, low, _row(lanes, state, LOW)), state, LOW)


@vector(types.void)
def begin_q4(lanes: Lanes, x: Array, weights: Array, state: Array) -> None:
    _begin(lanes, x, weights, state, 32, 15, True)


@vector(types.void)
def try_q4(lanes: Lanes, x: Array, weights: Array, codes: Array, state: Array, reach: Value) -> None:
    _try(lanes, x, weights, codes, state, reach, 32, 15, True)


@vector(types.void)
def end_q4(lanes: Lanes, x: Array, codes: Array, state: Array) -> None:
    _end(lanes, x, codes, state, 32, 15)


@vector(types.void)
def begin_q5(lanes: Lanes, x: Array, weights: Array, state: Array) -> None:
    _begin(lanes, x, weights, state, 32, 31, True)


@vector(types.void)
def try_q5(lanes: Lanes, x: Array, weights: Array, codes: Array, state: Array, reach: Value) -> None:
    _try(lanes, x, weights, codes, state, reach, 32, 31, True)


@vector(types.void)
def end_q5(lanes: Lanes, x: Array, codes: Array, state: Array) -> None:
    _end(lanes, x, codes, state, 32, 31)


@vector(types.void)
def begin_q2(lanes: Lanes, x: Array, weights: Array, state: Array) -> None:
    _begin(lanes, x, weights, state, 16, 3, False)


@vector(types.void)
def try_q2(lanes: Lanes, x: Array, weights: Array, codes: Array, state: Array, reach: Value) -> None:
    _try(lanes, x, weights, codes, state, reach, 16, 3, False)


@vector(types.void)
def end_q2(lanes: Lanes, x: Array, codes: Array, state: Array) -> None:
    _end(lanes, x, codes, state, 16, 3)


# --- a scale alone


def _extreme(lanes: Lanes, x: Array, n: int) -> tuple[Value, Value]:
    """The weight of greatest magnitude, the first of equals, and its magnitude."""
    top = size = _number(lanes, 0)
    for i in range(n):
        v = _row(lanes, x, i)
        magnitude = lanes.absolute(v)
        is_larger = _less(lanes, size, magnitude)
        top, size = lanes.b.select(is_larger, v, top), lanes.b.select(is_larger, magnitude, size)
    return top, size


@vector(types.void)
def begin_q6(lanes: Lanes, x: Array, state: Array) -> None:
    """make_qx_quants(16, 32, rmse_type 1): the first guess, by the weight of greatest magnitude."""
    top, size = _extreme(lanes, x, 16)
    _put(lanes, top, state, HIGH)
    _put(lanes, size, state, LOW)
    step = lanes.b.fdiv(_number(lanes, -32), top)
    sum_lx, sum_l2 = _fit_q6(lanes, x, step)
    zero = _number(lanes, 0)
    scale = lanes.b.select(lanes.b.fcmp_unordered("!=", sum_l2, zero), lanes.b.fdiv(sum_lx, sum_l2), zero)
    for row, value in ((SCALE, scale), (ERROR, lanes.b.fmul(scale, sum_lx)), (STEP, step)):
        _put(lanes, value, state, row)


def _fit_q6(lanes: Lanes, x: Array, step: Value) -> tuple[Value, Value]:
    """Sums of x^2 * x * code and x^2 * code * code."""
    sum_lx = sum_l2 = _number(lanes, 0)
    for i in range(16):
        v = _row(lanes, x, i)
        code = _nearest(lanes, lanes.b.fmul(step, v), -32, 31)
        w = lanes.b.fmul(v, v)
        sum_lx = lanes.b.fadd(sum_lx, lanes.b.fmul(lanes.b.fmul(w, v), code))
        sum_l2 = lanes.b.fadd(sum_l2, lanes.b.fmul(lanes.b.fmul(w, code), code))
    return sum_lx, sum_l2


@vector(types.void)
def try_q6(lanes: Lanes, x: Array, state: Array, reach: Value) -> None:
    """Another number of steps, `reach`, to the greatest magnitude. ERROR holds what is to be exceeded."""
    b, zero = lanes.b, _number(lanes, 0)
    step = b.fdiv(b.fneg(lanes.splat(reach, LANES)), _row(lanes, state, HIGH))
    sum_lx, sum_l2 = _fit_q6(lanes, x, step)
    best = _row(lanes, state, ERROR)
    exceeds = _less(lanes, b.fmul(best, sum_l2), b.fmul(sum_lx, sum_lx))
    is_better = b.and_(_less(lanes, zero, sum_l2), exceeds)
    scale = b.fdiv(sum_lx, sum_l2)
    for row, value in ((SCALE, scale), (ERROR, b.fmul(scale, sum_lx)), (STEP, step)):
        _put(lanes, b.select(is_better, value, _row(lanes, state, row)), state, row)


@vector(types.void)
def end_q6(lanes: Lanes, x: Array, codes: Array, state: Array) -> None:
    """Codes from 0 to 63; a sub-block of nothing has scale and codes 0."""
    zero = _number(lanes, 0)
    is_nothing = _less(lanes, _row(lanes, state, LOW), _number(lanes, NOTHING))
    for i in range(16):
        code = _nearest(lanes, lanes.b.fmul(_row(lanes, state, STEP), _row(lanes, x, i)), -32, 31)
        _put(lanes, lanes.b.select(is_nothing, zero, lanes.op("fadd", code, 32)), codes, i)
    _put(lanes, lanes.b.select(is_nothing, zero, _row(lanes, state, SCALE)), state, SCALE)


@vector(types.void)
def begin_q3(lanes: Lanes, x: Array, codes: Array, state: Array) -> None:
    """make_q3_quants(16, 4): codes -4 to 3 by the weight of greatest magnitude, and their sums."""
    b = lanes.b
    top, size = _extreme(lanes, x, 16)
    _put(lanes, size, state, LOW)
    step = b.fdiv(_number(lanes, -4), top)
    sum_lx = sum_l2 = _number(lanes, 0)
    for i in range(16):
        v = _row(lanes, x, i)
        code = _nearest(lanes, b.fmul(step, v), -4, 3)
        _put(lanes, code, codes, i)
        w = b.fmul(v, v)
        sum_lx = b.fadd(sum_lx, b.fmul(b.fmul(w, v), code))
        sum_l2 = b.fadd(sum_l2, b.fmul(b.fmul(w, code), code))
    _put(lanes, sum_lx, state, SUM_X)
    _put(lanes, sum_l2, state, SUM_W)


@vector(types.void)
def improve_q3(lanes: Lanes, x: Array, codes: Array, state: Array) -> None:
    """Once over the weights: each takes the code that fits best beside the others'. ggml stops when none changes."""
    b, zero = lanes.b, _number(lanes, 0)
    sum_lx, sum_l2 = _row(lanes, state, SUM_X), _row(lanes, state, SUM_W)
    for i in range(16):
        v, code = _row(lanes, x, i), _row(lanes, codes, i)
        w = b.fmul(v, v)
        other_lx = b.fsub(sum_lx, b.fmul(b.fmul(w, v), code))
        other_l2 = b.fsub(sum_l2, b.fmul(b.fmul(w, code), code))
        found = _nearest(lanes, b.fdiv(b.fmul(v, other_l2), other_lx), -4, 3)
        new_lx = b.fadd(other_lx, b.fmul(b.fmul(w, v), found))
        new_l2 = b.fadd(other_l2, b.fmul(b.fmul(w, found), found))
        is_better = _less(lanes, b.fmul(b.fmul(sum_lx, sum_lx), new_l2), b.fmul(b.fmul(new_lx, new_lx), sum_l2))
        is_other = b.fcmp_unordered("!=", found, code)
        taken = b.and_(b.and_(_less(lanes, zero, other_lx), is_other), b.and_(_less(lanes, zero, new_l2), is_better))
        _put(lanes, b.select(taken, found, code), codes, i)
        sum_lx, sum_l2 = b.select(taken, new_lx, sum_lx), b.select(taken, new_l2, sum_l2)
    _put(lanes, sum_lx, state, SUM_X)
    _put(lanes, sum_l2, state, SUM_W)


@vector(types.void)
def end_q3(lanes: Lanes, codes: Array, state: Array) -> None:
    """Codes from 0 to 7; a sub-block of nothing has scale and codes 0."""
    b, zero = lanes.b, _number(lanes, 0)
    is_nothing = _less(lanes, _row(lanes, state, LOW), _number(lanes, NOTHING))
    for i in range(16):
        code = lanes.op("fadd", _row(lanes, codes, i), 4)
        _put(lanes, b.select(is_nothing, zero, code), codes, i)
    sum_lx, sum_l2 = _row(lanes, state, SUM_X), _row(lanes, state, SUM_W)
    scale = b.select(_less(lanes, zero, sum_l2), b.fdiv(sum_lx, sum_l2), zero)
    _put(lanes, b.select(is_nothing, zero, scale), state, SCALE)


# --- codes for the scales as they are stored


def _finish(
    lanes: Lanes, x: Array, codes: Array, scales: Array, lows: Array, out: Array, n: int, limits: tuple[int, int, int]
) -> None:
    """Codes (n, LANES), uint8: nearest((x + low) / scale) between limits, plus a shift; where scale is 0, the codes."""
    scale, low = _row(lanes, scales, 0), _row(lanes, lows, 0)
    is_kept = lanes.b.fcmp_ordered("==", scale, _number(lanes, 0))
    lowest, highest, shift = limits
    for i in range(n):
        v = lanes.b.fdiv(lanes.b.fadd(_row(lanes, x, i), low), scale)
        found = lanes.op("fadd", _nearest(lanes, v, lowest, highest), shift)
        code = lanes.b.fptosi(lanes.b.select(is_kept, _row(lanes, codes, i), found), WIDE)
        lanes.store(lanes.b.trunc(code, ir.VectorType(I8, LANES)), out, ir.Constant(ir.IntType(64), i * LANES))


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
