"""Searches by an importance matrix, beside those of search.py and search_line.py: importances, and scales of scales.

For why and how blocks stand side by side, see kernels/ggml/search.py.

Source: llama.cpp, ggml/src/ggml-quants.c: quantize_row_*_impl, make_qx_quants, make_qp_quants.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.ggml.search import (
    KIND,
    LANES,
    MAGIC,
    NOTHING,
    TENTH,
    WIDE,
    fit_scale,
    in_all,
    is_less,
    over_rows,
    put_row,
    row_of,
)
from loaders.quantization.kernels.lanes import F32, I8, Array, Lanes, Value, vector

ROUNDS = 5  # that make_qp_quants goes over the numbers at most


def _weigh(lanes: Lanes, x: Array, importance: Array, squares: Array, weights: Array, sums: Array, n: int) -> None:
    """Store the importances of n weights, importance * sqrt(square + x^2), and their sum in weight order.

    x, importance and weights: (n, LANES); squares and sums: a row of lanes.
    """
    b, square = lanes.b, row_of(lanes, squares, 0)

    def weigh(at: Value, total: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        root = lanes.call(f"llvm.sqrt.v{LANES}f32", KIND, b.fadd(square, b.fmul(v, v)))
        w = b.fmul(lanes.load(importance, at, LANES), root)
        lanes.store(w, weights, at)
        return [b.fadd(total, w)]

    [total] = over_rows(lanes, range(n), [in_all(lanes, 0)], weigh)
    put_row(lanes, total, sums, 0)


@vector(types.void)
def weigh_16(lanes: Lanes, x: Array, importance: Array, squares: Array, weights: Array, sums: Array) -> None:
    _weigh(lanes, x, importance, squares, weights, sums, 16)


@vector(types.void)
def weigh_32(lanes: Lanes, x: Array, importance: Array, squares: Array, weights: Array, sums: Array) -> None:
    _weigh(lanes, x, importance, squares, weights, sums, 32)


@vector(types.void)
def bytes_32(lanes: Lanes, codes: Array, out: Array) -> None:
    """Store codes (32, LANES), float32, as uint8."""

    def put(at: Value) -> list[Value]:
        whole = lanes.b.fptosi(lanes.load(codes, at, LANES), WIDE)
        lanes.store(lanes.b.trunc(whole, ir.VectorType(I8, LANES)), out, at)
        return []

    over_rows(lanes, range(32), [], put)


# --- a scale for codes around zero


@vector(types.void)
def fit_16_4(lanes: Lanes, x: Array, weights: Array, terms: Array, codes: Array, scales: Array) -> None:
    fit_scale(lanes, x, weights, terms, codes, scales, (16, 4))


@vector(types.void)
def fit_16_32(lanes: Lanes, x: Array, weights: Array, terms: Array, codes: Array, scales: Array) -> None:
    fit_scale(lanes, x, weights, terms, codes, scales, (16, 32))


@vector(types.void)
def fit_32_8(lanes: Lanes, x: Array, weights: Array, terms: Array, codes: Array, scales: Array) -> None:
    fit_scale(lanes, x, weights, terms, codes, scales, (32, 8))


@vector(types.void)
def fit_32_16(lanes: Lanes, x: Array, weights: Array, terms: Array, codes: Array, scales: Array) -> None:
    fit_scale(lanes, x, weights, terms, codes, scales, (32, 16))


# --- a scale for numbers that are not negative


def _whole(lanes: Lanes, v: Value) -> Value:
    """Return ggml's nearest_int as integers, whatever the bits of v give."""
    bits = lanes.b.bitcast(lanes.op("fadd", v, MAGIC), WIDE)
    return lanes.op("sub", lanes.op("and_", bits, 0x7FFFFF), 0x400000)


class _Steps:
    """make_qp_quants for rows of lanes: a scale by which n numbers become codes from 0 to `top`.

    Codes are C's uint8_t: a number that is negative, as no scale or minimum should be, wraps.
    """

    def __init__(self, lanes: Lanes, x: Array, weights: Array, codes: Array, n: int, top: int) -> None:
        self.lanes = lanes
        self._arrays = x, weights, codes
        self._n = n
        self._top = top

    def search(self, scales: Array) -> None:
        """Store the codes, and the scale; where all numbers are next to nothing, both are 0."""
        lanes, b, (x, _, codes) = self.lanes, self.lanes.b, self._arrays
        zero, number = in_all(lanes, 0), ir.IntType(64)

        def larger(at: Value, most: Value) -> list[Value]:
            return [lanes.larger(most, lanes.load(x, at, LANES))]

        [most] = over_rows(lanes, range(self._n), [zero], larger)
        step = b.fdiv(in_all(lanes, self._top), most)
        error = self._misfit(step, lambda whole: lanes.op("and_", whole, 255))

        def improve(index: Value, step: Value, error: Value) -> list[Value]:
            k = b.sub(lanes.op("sub", index, 4), b.sext(b.icmp_signed(">=", index, ir.Constant(number, 4)), number))
            reach = lanes.op("fadd", lanes.op("fmul", b.sitofp(k, F32), TENTH), self._top)
            tried = b.fdiv(lanes.splat(reach, LANES), most)
            missed = self._misfit(tried, self._limited)
            is_better = is_less(lanes, missed, error)
            return [b.select(is_better, tried, step), b.select(is_better, missed, error)]

        step, _ = lanes.fold(ir.Constant(number, 0), ir.Constant(number, 8), 1, [step, error], improve)
        # Where nothing changes in a round ggml stops; a lane that has settled changes no more.
        rounds = ir.Constant(number, 0), ir.Constant(number, ROUNDS), 1
        sum_lx, sum_l2 = lanes.fold(*rounds, self._coded(step), lambda _, *sums: self._improved(*sums))
        is_nothing = is_less(lanes, most, in_all(lanes, NOTHING))

        def clear(at: Value) -> list[Value]:
            lanes.store(b.select(is_nothing, zero, lanes.load(codes, at, LANES)), codes, at)
            return []

        over_rows(lanes, range(self._n), [], clear)
        scale = b.select(is_less(lanes, zero, sum_l2), b.fdiv(sum_lx, sum_l2), zero)
        put_row(lanes, b.select(is_nothing, zero, scale), scales, 0)

    def _limited(self, whole: Value) -> Value:
        top = self.lanes.const(WIDE, self._top)
        return self.lanes.b.select(self.lanes.b.icmp_signed("<", top, whole), top, whole)

    def _misfit(self, step: Value, coded: Callable[[Value], Value]) -> Value:
        """Return the weighted sum of squared errors of codes by a step, 1 / scale."""
        lanes, b, (x, weights, _) = self.lanes, self.lanes.b, self._arrays
        scale = b.fdiv(in_all(lanes, 1), step)

        def add(at: Value, error: Value) -> list[Value]:
            v, w = lanes.load(x, at, LANES), lanes.load(weights, at, LANES)
            code = b.sitofp(coded(_whole(lanes, b.fmul(step, v))), KIND)
            missed = b.fsub(v, b.fmul(scale, code))
            return [b.fadd(error, b.fmul(b.fmul(w, missed), missed))]

        [error] = over_rows(lanes, range(self._n), [in_all(lanes, 0)], add)
        return error

    def _coded(self, step: Value) -> list[Value]:
        """Store the codes by a step; return the weighted sums of x * code and of code * code."""
        lanes, b, (x, weights, codes) = self.lanes, self.lanes.b, self._arrays

        def code(at: Value, sum_lx: Value, sum_l2: Value) -> list[Value]:
            v, w = lanes.load(x, at, LANES), lanes.load(weights, at, LANES)
            whole = self._limited(_whole(lanes, b.fmul(step, v)))
            lanes.store(b.sitofp(lanes.op("and_", whole, 255), KIND), codes, at)
            found = b.sitofp(whole, KIND)
            return [
                b.fadd(sum_lx, b.fmul(b.fmul(w, v), found)),
                b.fadd(sum_l2, b.fmul(b.fmul(w, found), found)),
            ]

        return over_rows(lanes, range(self._n), [in_all(lanes, 0)] * 2, code)

    def _improved(self, sum_lx: Value, sum_l2: Value) -> list[Value]:
        """Go once over the numbers: each takes the code that fits best with the codes of the others."""
        lanes, b, codes = self.lanes, self.lanes.b, self._arrays[2]
        zero = in_all(lanes, 0)

        def improve(at: Value, sum_lx: Value, sum_l2: Value) -> list[Value]:
            v, w, code = (lanes.load(array, at, LANES) for array in self._arrays)
            other_lx = b.fsub(sum_lx, b.fmul(b.fmul(w, v), code))
            other_l2 = b.fsub(sum_l2, b.fmul(b.fmul(w, code), code))
            is_there = b.and_(is_less(lanes, zero, other_lx), is_less(lanes, zero, other_l2))
            whole = self._limited(_whole(lanes, b.fdiv(b.fmul(v, other_l2), other_lx)))
            found = b.sitofp(whole, KIND)
            new_lx = b.fadd(other_lx, b.fmul(b.fmul(w, v), found))
            new_l2 = b.fadd(other_l2, b.fmul(b.fmul(w, found), found))
            is_better = is_less(lanes, b.fmul(b.fmul(sum_lx, sum_lx), new_l2), b.fmul(b.fmul(new_lx, new_lx), sum_l2))
            is_taken = b.and_(b.and_(is_there, b.fcmp_unordered("!=", found, code)), is_better)
            lanes.store(b.select(is_taken, b.sitofp(lanes.op("and_", whole, 255), KIND), code), codes, at)
            return [b.select(is_taken, new_lx, sum_lx), b.select(is_taken, new_l2, sum_l2)]

        return over_rows(lanes, range(self._n), [sum_lx, sum_l2], improve)


@vector(types.void)
def steps_16_15(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array) -> None:
    _Steps(lanes, x, weights, codes, 16, 15).search(scales)


@vector(types.void)
def steps_8_63(lanes: Lanes, x: Array, weights: Array, codes: Array, scales: Array) -> None:
    _Steps(lanes, x, weights, codes, 8, 63).search(scales)
