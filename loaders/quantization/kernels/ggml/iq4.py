"""Encoders of ggml's IQ4_NL and IQ4_XS: four bits, codes of sixteen levels that lie closer around zero.

    IQ4_NL   32 weights: d, codes (16)                                              w = d level[q]
    IQ4_XS   256 weights: d, scales' high bits (2) and low bits (4), codes (128)    w = d (s - 32) level[q]
d is float16; a scale s of IQ4_XS has six bits, for 32 weights. Byte j of 16 holds weight j low and j + 16 high.
The scale is the best by weighted least squares of those that take the greatest weight to -127 + k, k from -7 to 7. An
error counts by the weight's square; by an importance matrix, by the importance of its input channel times the root of
the weight's square and twice the block's mean square.

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_iq4_nl_impl.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.ggml import search
from loaders.quantization.kernels.ggml.k_quants import nearest, order, put_half, spread, to_floats
from loaders.quantization.kernels.ggml.search import LANES, NOTHING, WIDE, in_all, is_less, over_rows, put_row
from loaders.quantization.kernels.ggml.search_weighted import weigh_32
from loaders.quantization.kernels.ggml.weighted_k_quants import mean_squares
from loaders.quantization.kernels.intrinsics import aligned_floats
from loaders.quantization.kernels.lanes import F32, I8, Array, Lanes, Value, kernel, vector

N = 32  # weights of a scale
SUPER = 256  # of a super-block of IQ4_XS
PART = 64 * SUPER  # weights that are widened to float32 at once
F = np.float32
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl
# From a middle on, the upper level is taken. ggml compares the distances, whose rounding changes nothing near a middle.
MIDDLES = tuple((low + high) / 2 for low, high in pairwise(LEVELS))
TRIES = 7  # to either side


def _index(lanes: Lanes, v: Value) -> Value:
    """Return best_index_int8, int32 codes: by halving, a bit at a time. NaN is taken for the greatest."""
    b = lanes.b
    table = lanes.const(ir.VectorType(F32, 16), [*MIDDLES, 0])
    code = lanes.const(WIDE, 0)
    for step in (8, 4, 2, 1):
        tried = lanes.op("add", code, step)
        middle = lanes.looked_up(table, lanes.op("sub", tried, 1))
        code = b.select(b.fcmp_unordered(">=", v, middle), tried, code)
    return code


@vector(types.void)
def weigh_by_square(lanes: Lanes, x: Array, weights: Array) -> None:
    """Store x^2 of 32 weights."""

    def put(at: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        lanes.store(lanes.b.fmul(v, v), weights, at)
        return []

    over_rows(lanes, range(N), [], put)


@vector(types.void)
def block_squares(lanes: Lanes, x: Array, squares: Array) -> None:
    """Store twice the mean square of 32 weights."""

    def add(at: Value, total: Value) -> list[Value]:
        v = lanes.load(x, at, LANES)
        return [lanes.b.fadd(total, lanes.b.fmul(v, v))]

    [total] = over_rows(lanes, range(N), [in_all(lanes, 0)], add)
    put_row(lanes, lanes.op("fmul", total, 2 / N), squares, 0)


@vector(types.void)
def fit_levels(lanes: Lanes, x: Array, weights: Array, scales: Array) -> None:
    """Store the scales; that of a block of nothing is 0."""
    b, zero, number = lanes.b, in_all(lanes, 0), ir.IntType(64)
    levels = lanes.const(ir.VectorType(F32, 16), LEVELS)
    top, size = search.extreme(lanes, x, N)

    def sums(inverse: Value) -> list[Value]:
        def add(at: Value, sum_qx: Value, sum_q2: Value) -> list[Value]:
            v, w = lanes.load(x, at, LANES), lanes.load(weights, at, LANES)
            q = lanes.looked_up(levels, _index(lanes, b.fmul(inverse, v)))
            weighted = b.fmul(w, q)
            return [b.fadd(sum_qx, b.fmul(weighted, v)), b.fadd(sum_q2, b.fmul(weighted, q))]

        return over_rows(lanes, range(N), [zero, zero], add)

    first = b.fdiv(b.fneg(top), in_all(lanes, LEVELS[0]))
    sum_qx, sum_q2 = sums(b.fdiv(in_all(lanes, 1), first))
    scale = b.select(is_less(lanes, zero, sum_q2), b.fdiv(sum_qx, sum_q2), zero)

    def improve(index: Value, scale: Value, best: Value) -> list[Value]:
        reach = lanes.op("fadd", b.sitofp(index, F32), LEVELS[0] - TRIES)
        sum_qx, sum_q2 = sums(b.fdiv(lanes.splat(reach, LANES), top))
        exceeds = is_less(lanes, b.fmul(best, sum_q2), b.fmul(sum_qx, sum_qx))
        is_better = b.and_(is_less(lanes, zero, sum_q2), exceeds)
        found = b.fdiv(sum_qx, sum_q2)
        return [b.select(is_better, found, scale), b.select(is_better, b.fmul(found, sum_qx), best)]

    tries = ir.Constant(number, 0), ir.Constant(number, 2 * TRIES + 1), 1
    scale, _ = lanes.fold(*tries, [scale, b.fmul(scale, sum_qx)], improve)
    put_row(lanes, b.select(is_less(lanes, size, in_all(lanes, NOTHING)), zero, scale), scales, 0)


@vector(types.void)
def find_levels(lanes: Lanes, x: Array, inverses: Array, codes: Array) -> None:
    """Store the codes, uint8 (32, LANES), of 32 weights times a row of inverse scales."""
    inverse = search.row_of(lanes, inverses, 0)

    def put(at: Value) -> list[Value]:
        code = _index(lanes, lanes.b.fmul(inverse, lanes.load(x, at, LANES)))
        lanes.store(lanes.b.trunc(code, ir.VectorType(I8, LANES)), codes, at)
        return []

    over_rows(lanes, range(N), [], put)


@kernel
def _put_nibbles(codes, first, out, at):  # type: ignore[no-untyped-def]
    for j in range(16):
        out[at + j] = codes[first + j] | np.uint8(codes[first + 16 + j] << np.uint8(4))


@kernel
def _inverse(scale):  # type: ignore[no-untyped-def]
    return F(1) / scale if scale != 0 else F(0)


@kernel
def _weigh(xt, it, squares, is_weighted, weights, sums):  # type: ignore[no-untyped-def]
    if is_weighted:
        weigh_32(xt, it, squares, weights, sums)
    else:
        weigh_by_square(xt, weights)


@kernel
def encode_iq4_nl(x, importance, out):  # type: ignore[no-untyped-def]
    """Encode IQ4_NL. x: float32 (n,), n a multiple of 32; importance: likewise, or empty; out: uint8 (n / 32 * 18,)."""
    xt, it, weights = aligned_floats(N * LANES), aligned_floats(N * LANES), aligned_floats(N * LANES)
    scales, squares, sums = aligned_floats(LANES), aligned_floats(LANES), aligned_floats(LANES)
    small, ordered = np.empty(N * LANES, np.uint8), np.empty(N * LANES, np.uint8)
    is_weighted = importance.size > 0
    for first in range(0, x.size // N, LANES):
        spread(x, first * N, N, xt)
        if is_weighted:
            spread(importance, first * N, N, it)
            block_squares(xt, squares)
        _weigh(xt, it, squares, is_weighted, weights, sums)
        fit_levels(xt, weights, scales)
        here = min(LANES, x.size // N - first)
        for k in range(here):
            put_half(out, (first + k) * 18, scales[k])
        for k in range(LANES):
            scales[k] = _inverse(scales[k])
        find_levels(xt, scales, small)
        order(small, N, ordered)
        for k in range(here):
            _put_nibbles(ordered, k * N, out, (first + k) * 18 + 2)


@kernel
def _put_scales(scales, first, out, at):  # type: ignore[no-untyped-def]
    """Store d and the eight scales of a super-block at `at`; scales, from `first` on, become inverses."""
    top, size = F(0), F(0)
    for k in range(first, first + 8):
        if abs(scales[k]) > size:
            top, size = scales[k], abs(scales[k])
    d = -top / F(32)
    put_half(out, at, d)
    out[at + 2 : at + 8] = 0
    inverse = _inverse(d)
    for j in range(8):
        scale = max(np.int32(-32), min(np.int32(31), nearest(inverse * scales[first + j])))
        scales[first + j] = _inverse(d * F(scale))
        bits = scale + np.int32(32)
        out[at + 4 + j // 2] |= np.uint8((bits & 15) << (4 * (j % 2)))
        out[at + 2 + j // 4] |= np.uint8((bits >> 4) << (2 * (j % 4)))


@kernel
def encode_iq4_xs(x, importance, out):  # type: ignore[no-untyped-def]
    """Encode IQ4_XS.

    x: float32 (n,), n a multiple of 256; importance: likewise, or empty; out: uint8 (n / 256 * 136,).
    """
    xt, it, weights = aligned_floats(N * LANES), aligned_floats(N * LANES), aligned_floats(N * LANES)
    scales, squares, sums = aligned_floats(LANES), aligned_floats(LANES), aligned_floats(LANES)
    small, ordered = np.empty(N * LANES, np.uint8), np.empty(N * LANES, np.uint8)
    is_weighted, per, count = importance.size > 0, LANES // 8, x.size // SUPER
    means = np.zeros(count + per, F)
    if is_weighted:
        mean_squares(x, SUPER, F(2), means)
    for first in range(0, count, per):
        spread(x, first * SUPER, N, xt)
        if is_weighted:
            spread(importance, first * SUPER, N, it)
            for k in range(LANES):
                squares[k] = means[first + k // 8]
        _weigh(xt, it, squares, is_weighted, weights, sums)
        fit_levels(xt, weights, scales)
        here = min(per, count - first)
        for s in range(here):
            _put_scales(scales, s * 8, out, (first + s) * 136)
        find_levels(xt, scales, small)
        order(small, N, ordered)
        for k in range(8 * here):
            _put_nibbles(ordered, k * N, out, (first + k // 8) * 136 + 8 + k % 8 * 16)


# --- without an importance matrix, from raw weights of any dtype


@kernel
def encode_plain_iq4_nl(x, out):  # type: ignore[no-untyped-def]
    values, nothing = aligned_floats(PART), np.empty(0, F)
    for start in range(0, x.size, PART):
        some = x[start : start + PART]
        to_floats(some, values[: some.size])
        encode_iq4_nl(values[: some.size], nothing, out[start // N * 18 :])


@kernel
def encode_plain_iq4_xs(x, out):  # type: ignore[no-untyped-def]
    values, nothing = aligned_floats(PART), np.empty(0, F)
    for start in range(0, x.size, PART):
        some = x[start : start + PART]
        to_floats(some, values[: some.size])
        encode_iq4_xs(values[: some.size], nothing, out[start // SUPER * 136 :])
