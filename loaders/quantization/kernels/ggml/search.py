"""The searches for scales of ggml's K-quants: what all share, and those of Q3_K and Q6_K.

ggml finds the scale (and least value) of each sub-block by trying some, and adds its sums weight by weight, so that one
sub-block cannot be spread over vector lanes without changing bytes. Instead, LANES sub-blocks stand side by side, a
lane each: every lane does exactly what the C code does, in float32 and in its order. Arrays hold a row of lanes for
each weight of a sub-block: (n, LANES) flat, n = 16 or 32. AVX2 has registers for sixteen lanes: with more, or with the
loop over weights unrolled, sums go through memory and compiling takes seconds. AVX-512 has registers for sixty-four,
which are four vectors there: while the sum of one waits for its last addition, the others' go on.

Source: llama.cpp, ggml/src/ggml-quants.c: make_q3_quants, make_qx_quants (Q6_K).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, host_has, vector

LANES = 64 if host_has("avx512f") else 16  # sub-blocks side by side
TOP, SUM_LX, SUM_L2 = range(3)  # rows of the state of Q3_K's search
NOTHING = 1e-15  # ggml's GROUP_MAX_EPS: a sub-block whose magnitudes are all below it is zero (Q3_K, Q6_K)
MAGIC = 12582912.0  # 1.5 * 2^23, as in ggml's nearest_int: adding it leaves the nearest integer in the low bits
TENTH = float(np.float32(0.1))  # the searches go by steps of C's 0.1f, which is not the double 0.1
KIND = ir.VectorType(F32, LANES)
WIDE = ir.VectorType(I32, LANES)


def place_of(row: int) -> Value:
    """Return the entry at which a row of lanes begins."""
    return ir.Constant(ir.IntType(64), row * LANES)


def row_of(lanes: Lanes, array: Array, row: int) -> Value:
    """Load a row of lanes."""
    return lanes.load(array, place_of(row), LANES)


def put_row(lanes: Lanes, value: Value, array: Array, row: int) -> None:
    """Store a row of lanes."""
    lanes.store(value, array, place_of(row))


def over_rows(lanes: Lanes, rows: range, values: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
    """Repeat values = body(at, *values) for some rows of lanes; `at` is the entry at which a row begins."""
    return lanes.fold(place_of(rows.start), place_of(rows.stop), LANES, values, body)


def in_all(lanes: Lanes, value: float) -> Value:
    """Return a row of lanes that all hold one number."""
    return lanes.const(KIND, value)


def nearest_int(lanes: Lanes, v: Value, lowest: int, highest: int) -> Value:
    """Return ggml's nearest_int, clamped, as float32.

    Values that are not finite or beyond 2^22 give what their bits make of them, as in ggml: the mask and the bias are
    applied whatever they are.
    """
    bits = lanes.b.bitcast(lanes.op("fadd", v, MAGIC), WIDE)
    whole = lanes.op("sub", lanes.op("and_", bits, 0x7FFFFF), 0x400000)
    low, high = lanes.const(WIDE, lowest), lanes.const(WIDE, highest)
    whole = lanes.b.select(lanes.b.icmp_signed("<", whole, high), whole, high)
    whole = lanes.b.select(lanes.b.icmp_signed(">", whole, low), whole, low)
    return lanes.b.sitofp(whole, KIND)


def is_less(lanes: Lanes, a: Value, b: Value) -> Value:
    """Return C's `a < b`, lane by lane: false where either is NaN."""
    return lanes.b.fcmp_ordered("<", a, b)


def extreme(lanes: Lanes, x: Array, n: int) -> list[Value]:
    """Return the weight of greatest magnitude, the first of equals, and its magnitude."""

    def larger(at: Value, top: Value, size: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        magnitude = lanes.absolute(v)
        is_larger = is_less(lanes, size, magnitude)
        return [lanes.b.select(is_larger, v, top), lanes.b.select(is_larger, magnitude, size)]

    return over_rows(lanes, range(n), [in_all(lanes, 0)] * 2, larger)


def _add_fit(lanes: Lanes, v: Value, code: Value, sums: tuple[Value, Value]) -> list[Value]:
    """Add one weight to the sums of x^2 * x * code and of x^2 * code * code, multiplied in ggml's order."""
    w = lanes.b.fmul(v, v)
    terms = lanes.b.fmul(lanes.b.fmul(w, v), code), lanes.b.fmul(lanes.b.fmul(w, code), code)
    return [lanes.b.fadd(total, term) for total, term in zip(sums, terms, strict=True)]


def nearest_of(lanes: Lanes, v: Value, lowest: int | None, highest: int) -> Value:
    """Return `nearest_int` of values below 2^22, clamped, in fewer operations. NaN becomes the lowest, if given."""
    if host_has("avx2"):
        nearest = lanes.call(f"llvm.rint.v{LANES}f32", KIND, v)
    else:  # without an instruction for it, LLVM would call a function for each lane
        nearest = lanes.op("fsub", lanes.op("fadd", v, MAGIC), MAGIC)
    most = in_all(lanes, highest)
    above = nearest if lowest is None else lanes.larger(nearest, in_all(lanes, lowest))
    return lanes.b.select(is_less(lanes, above, most), above, most)


class _Fit:
    """Fits of a scale to blocks of n weights, by codes from -top to top - 1.

    Errors count by `weights` (n, LANES), or by x^2 where that is None. `terms` is memory for a weight's importance w,
    and for w * x, a row each. With a NaN or an infinity among the weights, the scale becomes NaN whatever the codes
    are.
    """

    def __init__(self, lanes: Lanes, x: Array, weights: Array | None, terms: Array, n: int, top: int) -> None:
        self.lanes = lanes
        self._arrays = x, terms
        self._n = n
        self._top = top

        def put(at: Value) -> list[Value]:
            v = lanes.load(x, at, LANES)
            w = lanes.b.fmul(v, v) if weights is None else lanes.load(weights, at, LANES)
            lanes.store(w, terms, lanes.op("mul", at, 2))
            lanes.store(lanes.b.fmul(w, v), terms, lanes.op("add", lanes.op("mul", at, 2), LANES))
            return []

        over_rows(lanes, range(n), [], put)

    def sums(self, step: Value, *, reaches: bool) -> list[Value]:
        """Return the sums of w * x * code and of w * code * code, multiplied in ggml's order; step: 1 / scale.

        Without `reaches` no weight is so large that it would take the step beyond -top.
        """
        lanes, b, (x, terms) = self.lanes, self.lanes.b, self._arrays

        def add(at: Value, sum_lx: Value, sum_l2: Value) -> list[Value]:
            twice = lanes.op("mul", at, 2)
            w, wv = lanes.load(terms, twice, LANES), lanes.load(terms, lanes.op("add", twice, LANES), LANES)
            v = b.fmul(step, lanes.load(x, at, LANES))
            code = nearest_of(lanes, v, -self._top if reaches else None, self._top - 1)
            return [b.fadd(sum_lx, b.fmul(wv, code)), b.fadd(sum_l2, b.fmul(b.fmul(w, code), code))]

        return over_rows(lanes, range(self._n), [in_all(lanes, 0)] * 2, add)


def fit_scale(
    lanes: Lanes, x: Array, weights: Array | None, terms: Array, codes: Array, scales: Array, shape: tuple[int, int]
) -> None:
    """Search as make_qx_quants(n, limit, rmse_type 1), for `shape` = (n, limit).

    The first scale takes the greatest weight to -limit, eighteen others take it to -limit - 0.1 * k, k from -9 to 9
    without 0; the best fit by weighted least squares is kept. Codes are from 0 to 2 limit - 1; a block of nothing has
    scale and codes 0. For `weights` and `terms` see `_Fit`.
    """
    b, zero, number = lanes.b, in_all(lanes, 0), ir.IntType(64)
    n, limit = shape
    top, size = extreme(lanes, x, n)
    step, fit = b.fdiv(in_all(lanes, -limit), top), _Fit(lanes, x, weights, terms, n, limit)
    sum_lx, sum_l2 = fit.sums(step, reaches=False)
    scale = b.select(b.fcmp_unordered("!=", sum_l2, zero), b.fdiv(sum_lx, sum_l2), zero)

    def improve(index: Value, *best: Value, reaches: bool) -> list[Value]:
        """Try one more step. `best` is a scale, the measure of its fit (scale * sum_lx), and 1 / scale for codes."""
        k = b.sub(lanes.op("sub", index, 9), b.sext(b.icmp_signed(">=", index, ir.Constant(number, 9)), number))
        reach = lanes.op("fadd", lanes.op("fmul", b.sitofp(k, F32), TENTH), limit)
        step = b.fdiv(lanes.splat(b.fneg(reach), LANES), top)
        sum_lx, sum_l2 = fit.sums(step, reaches=reaches)
        exceeds = is_less(lanes, b.fmul(best[1], sum_l2), b.fmul(sum_lx, sum_lx))
        is_better = b.and_(is_less(lanes, zero, sum_l2), exceeds)
        scale = b.fdiv(sum_lx, sum_l2)
        tried = (scale, b.fmul(scale, sum_lx), step)
        return [b.select(is_better, new, old) for new, old in zip(tried, best, strict=True)]

    best = [scale, b.fmul(scale, sum_lx), step]
    # From k = 5 on the greatest weight may be taken to -limit - 1.
    for first, last, reaches in ((0, 13, False), (13, 18, True)):
        tries = ir.Constant(number, first), ir.Constant(number, last), 1
        best = lanes.fold(*tries, best, partial(improve, reaches=reaches))
    scale, _, step = best
    is_nothing = is_less(lanes, size, in_all(lanes, NOTHING))

    def put(at: Value) -> list[Value]:
        found = nearest_int(lanes, b.fmul(step, lanes.load(x, at, LANES)), -limit, limit - 1)
        lanes.store(b.select(is_nothing, zero, lanes.op("fadd", found, limit)), codes, at)
        return []

    over_rows(lanes, range(n), [], put)
    put_row(lanes, b.select(is_nothing, zero, scale), scales, 0)


@vector(types.void)
def search_q6(lanes: Lanes, x: Array, terms: Array, codes: Array, scales: Array) -> None:
    fit_scale(lanes, x, None, terms, codes, scales, (16, 32))


@vector(types.void)
def begin_q3(lanes: Lanes, x: Array, codes: Array, state: Array) -> None:
    """Begin make_q3_quants(16, 4): codes from -4 to 3 by the weight of greatest magnitude, and sums of their fit."""
    b = lanes.b
    top, size = extreme(lanes, x, 16)
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
    """Go once over the weights of make_q3_quants: each takes the code that fits best with the codes of the others.

    Returns 0 if no code of any lane changed. A lane that has settled changes no more, so further rounds leave it alone.
    """
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
    """End make_q3_quants: shift codes to 0 to 7, and store scales. A sub-block of nothing has scale and codes 0."""
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
    """Find the codes again by the scales as they are stored: nearest((x + low) / scale), clamped, plus a shift.

    `limits` are the lowest and highest code and the shift; out: uint8 (n, LANES). Where a stored scale is 0, ggml skips
    this step, and the codes of the search stay.
    """
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
