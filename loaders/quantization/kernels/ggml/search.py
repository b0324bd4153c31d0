"""The searches for scales of ggml's K-quants, sixteen sub-blocks side by side; those of Q3_K and Q6_K.

ggml looks for the scale (and least value) of each sub-block by trying some, and adds its sums in order, so that one
sub-block cannot be spread over vector lanes without changing bytes. Many can stand side by side, a lane each: every
lane does exactly what the C code does, in float32 and in its order. Arrays hold a row of lanes for each weight of a
sub-block: (n, LANES) flat, n = 16 or 32. Sixteen lanes are what AVX2 has registers for: with more, or with all the
weights written out one after another, sums go through memory, and compiling takes seconds.

Source: llama.cpp, ggml/src/ggml-quants.c: make_q3_quants, make_qx_quants (Q6_K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, vector

LANES = 16
TOP, SUM_LX, SUM_L2 = range(3)  # rows of the state of Q3_K's search
NOTHING = 1e-15  # a sub-block whose magnitudes are all below is zero (Q3_K, Q6_K)
MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the lowest bits
TENTH = float(np.float32(0.1))
KIND = ir.VectorType(F32, LANES)
WIDE = ir.VectorType(I32, LANES)


def place_of(row: int) -> Value:
    return ir.Constant(ir.IntType(64), row * LANES)


def row_of(lanes: Lanes, array: Array, row: int) -> Value:
    return lanes.load(array, place_of(row), LANES)


def put_row(lanes: Lanes, value: Value, array: Array, row: int) -> None:
    lanes.store(value, array, place_of(row))


def over_rows(lanes: Lanes, rows: range, values: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
    """Repeat values = body(at, *values) for the rows of a sub-block's weights, which begin `at`."""
    return lanes.fold(place_of(rows.start), place_of(rows.stop), LANES, values, body)


def in_all(lanes: Lanes, value: float) -> Value:
    return lanes.const(KIND, value)


def nearest_int(lanes: Lanes, v: Value, lowest: int, highest: int) -> Value:
    """The nearest_int of ggml, clamped, as float32. What is not finite or beyond 2^22 comes out as its bits make it."""
    bits = lanes.b.bitcast(lanes.op("fadd", v, MAGIC), WIDE)
    whole = lanes.op("sub", lanes.op("and_", bits, 0x7FFFFF), 0x400000)
    low, high = lanes.const(WIDE, lowest), lanes.const(WIDE, highest)
    whole = lanes.b.select(lanes.b.icmp_signed("<", whole, high), whole, high)
    whole = lanes.b.select(lanes.b.icmp_signed(">", whole, low), whole, low)
    return lanes.b.sitofp(whole, KIND)


def is_less(lanes: Lanes, a: Value, b: Value) -> Value:
    return lanes.b.fcmp_ordered("<", a, b)


def _extreme(lanes: Lanes, x: Array, n: int) -> list[Value]:
    """The weight of greatest magnitude, the first of equals, and its magnitude."""

    def larger(at: Value, top: Value, size: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        magnitude = lanes.absolute(v)
        is_larger = is_less(lanes, size, magnitude)
        return [lanes.b.select(is_larger, v, top), lanes.b.select(is_larger, magnitude, size)]

    return over_rows(lanes, range(n), [in_all(lanes, 0)] * 2, larger)


def _add_fit(lanes: Lanes, v: Value, code: Value, sums: tuple[Value, Value]) -> list[Value]:
    """Sums of x^2 * x * code and x^2 * code * code, and one weight more."""
    w = lanes.b.fmul(v, v)
    terms = lanes.b.fmul(lanes.b.fmul(w, v), code), lanes.b.fmul(lanes.b.fmul(w, code), code)
    return [lanes.b.fadd(total, term) for total, term in zip(sums, terms, strict=True)]


def _fit_q6(lanes: Lanes, x: Array, step: Value) -> list[Value]:
    """The sums of `_add_fit`."""

    def add(at: Value, *sums: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        return _add_fit(lanes, v, nearest_int(lanes, lanes.b.fmul(step, v), -32, 31), sums)

    return over_rows(lanes, range(16), [in_all(lanes, 0)] * 2, add)


@vector(types.void)
def search_q6(lanes: Lanes, x: Array, codes: Array, scales: Array) -> None:
    """make_qx_quants(16, 32, rmse_type 1): steps of the greatest magnitude / 32, and of 18 other numbers about it.

    Codes are from 0 to 63; a sub-block of nothing has scale and codes 0.
    """
    b, zero, number = lanes.b, in_all(lanes, 0), ir.IntType(64)
    top, size = _extreme(lanes, x, 16)
    step = b.fdiv(in_all(lanes, -32), top)
    sum_lx, sum_l2 = _fit_q6(lanes, x, step)
    scale = b.select(b.fcmp_unordered("!=", sum_l2, zero), b.fdiv(sum_lx, sum_l2), zero)

    def improve(index: Value, *best: Value) -> list[Value]:
        """What is best is a scale, what is to be exceeded, and a step."""
        reach = lanes.op("fadd", lanes.op("fmul", b.sitofp(index, F32), TENTH), 32)
        step = b.fdiv(lanes.splat(b.fneg(reach), LANES), top)
        sum_lx, sum_l2 = _fit_q6(lanes, x, step)
        exceeds = is_less(lanes, b.fmul(best[1], sum_l2), b.fmul(sum_lx, sum_lx))
        is_other = lanes.splat(b.icmp_signed("!=", index, ir.Constant(number, 0)), LANES)
        is_better = b.and_(b.and_(is_less(lanes, zero, sum_l2), exceeds), is_other)
        scale = b.fdiv(sum_lx, sum_l2)
        tried = (scale, b.fmul(scale, sum_lx), step)
        return [b.select(is_better, new, old) for new, old in zip(tried, best, strict=True)]

    begun = [scale, b.fmul(scale, sum_lx), step]
    scale, _, step = lanes.fold(ir.Constant(number, -9), ir.Constant(number, 10), 1, begun, improve)
    is_nothing = is_less(lanes, size, in_all(lanes, NOTHING))

    def put(at: Value) -> list[Value]:
        found = nearest_int(lanes, b.fmul(step, lanes.load(x, at, LANES)), -32, 31)
        lanes.store(b.select(is_nothing, zero, lanes.op("fadd", found, 32)), codes, at)
        return []

    over_rows(lanes, range(16), [], put)
    put_row(lanes, b.select(is_nothing, zero, scale), scales, 0)


@vector(types.void)
def begin_q3(lanes: Lanes, x: Array, codes: Array, state: Array) -> None:
    """make_q3_quants(16, 4): codes -4 to 3 by the weight of greatest magnitude, and their sums."""
    b = lanes.b
    top, size = _extreme(lanes, x, 16)
    put_row(lanes, size, state, TOP)
    step = b.fdiv(in_all(lanes, -4), top)

    def add(at: Value, *sums: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        code = nearest_int(lanes, b.fmul(step, v), -4, 3)
        lanes.store(code, codes, at)
        return _add_fit(lanes, v, code, sums)

    sum_lx, sum_l2 = over_rows(lanes, range(16), [in_all(lanes, 0)] * 2, add)
    put_row(lanes, sum_lx, state, SUM_LX)
    put_row(lanes, sum_l2, state, SUM_L2)


@vector(types.int32)
def improve_q3(lanes: Lanes, x: Array, codes: Array, state: Array) -> Value:
    """Once over the weights: each takes the code that fits best beside the others'. Gives 0 if none changed."""
    b, zero = lanes.b, in_all(lanes, 0)

    def improve(at: Value, sum_lx: Value, sum_l2: Value, changed: Value) -> list[Value]:
        v, code = lanes.load(x, at, LANES), lanes.load(codes, at, LANES)
        w = b.fmul(v, v)
        other_lx = b.fsub(sum_lx, b.fmul(b.fmul(w, v), code))
        other_l2 = b.fsub(sum_l2, b.fmul(b.fmul(w, code), code))
        found = nearest_int(lanes, b.fdiv(b.fmul(v, other_l2), other_lx), -4, 3)
        new_lx = b.fadd(other_lx, b.fmul(b.fmul(w, v), found))
        new_l2 = b.fadd(other_l2, b.fmul(b.fmul(w, found), found))
        is_better = is_less(lanes, b.fmul(b.fmul(sum_lx, sum_lx), new_l2), b.fmul(b.fmul(new_lx, new_lx), sum_l2))
        is_other = b.fcmp_unordered("!=", found, code)
        taken = b.and_(
            b.and_(is_less(lanes, zero, other_lx), is_other), b.and_(is_less(lanes, zero, new_l2), is_better)
        )
        better = b.select(taken, found, code)
        lanes.store(better, codes, at)
        sum_lx, sum_l2 = b.select(taken, new_lx, sum_lx), b.select(taken, new_l2, sum_l2)
        return [sum_lx, sum_l2, b.or_(changed, b.xor(*(b.bitcast(value, WIDE) for value in (better, code))))]

    begun = [row_of(lanes, state, SUM_LX), row_of(lanes, state, SUM_L2), lanes.const(WIDE, 0)]
    sum_lx, sum_l2, changed = over_rows(lanes, range(16), begun, improve)
    put_row(lanes, sum_lx, state, SUM_LX)
    put_row(lanes, sum_l2, state, SUM_L2)
    return lanes.reduce("or", changed)


@vector(types.void)
def end_q3(lanes: Lanes, codes: Array, state: Array, scales: Array) -> None:
    """Codes from 0 to 7; a sub-block of nothing has scale and codes 0."""
    b, zero = lanes.b, in_all(lanes, 0)
    is_nothing = is_less(lanes, row_of(lanes, state, TOP), in_all(lanes, NOTHING))

    def shift(at: Value) -> list[Value]:
        code = lanes.op("fadd", lanes.load(codes, at, LANES), 4)
        lanes.store(b.select(is_nothing, zero, code), codes, at)
        return []

    over_rows(lanes, range(16), [], shift)
    sum_lx, sum_l2 = row_of(lanes, state, SUM_LX), row_of(lanes, state, SUM_L2)
    scale = b.select(is_less(lanes, zero, sum_l2), b.fdiv(sum_lx, sum_l2), zero)
    put_row(lanes, b.select(is_nothing, zero, scale), scales, 0)


# --- codes for the scales as they are stored


def _finish(
    lanes: Lanes, x: Array, codes: Array, scales: Array, lows: Array, out: Array, n: int, limits: tuple[int, int, int]
) -> None:
    """Codes (n, LANES), uint8: nearest((x + low) / scale) between limits, plus a shift; where scale is 0, the codes."""
    scale, low = row_of(lanes, scales, 0), row_of(lanes, lows, 0)
    is_kept = lanes.b.fcmp_ordered("==", scale, in_all(lanes, 0))
    lowest, highest, shift = limits

    def code(at: Value) -> list[Value]:
        v = lanes.b.fdiv(lanes.b.fadd(lanes.load(x, at, LANES), low), scale)
        found = lanes.op("fadd", nearest_int(lanes, v, lowest, highest), shift)
        taken = lanes.b.fptosi(lanes.b.select(is_kept, lanes.load(codes, at, LANES), found), WIDE)
        lanes.store(lanes.b.trunc(taken, ir.VectorType(I8, LANES)), out, at)
        return []

    over_rows(lanes, range(n), [], code)


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
