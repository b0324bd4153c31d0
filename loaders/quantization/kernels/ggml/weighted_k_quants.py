"""Encoders of ggml's K-quants by an importance matrix, byte for byte as its quantize_row_*_impl.

What a super-block holds is described in k_quants.py. A weight's error counts by the importance of its input channel
times the root of the weight's own square and the super-block's mean square (of Q3_K, Q4_K and Q5_K twice that); of Q6_K
by the importance alone. The scales of sub-blocks are then fitted themselves, by the sums of their weights' importances.

LANES super-blocks go through together: their sub-blocks in turn, LANES at once, and then all their scales. Encoders
take weights and importances as float32 (n,), n a multiple of 256, and fill blocks in, uint8.

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_q2_K_impl to quantize_row_q6_K_impl.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.ggml import k_quants, search
from loaders.quantization.kernels.ggml import search_line as line
from loaders.quantization.kernels.ggml import search_weighted as weighted
from loaders.quantization.kernels.ggml.k_quants import SUPER, merge, order, put_half, quarters, scales_of_q6, spread
from loaders.quantization.kernels.intrinsics import aligned_floats
from loaders.quantization.kernels.lanes import inlined, kernel

LANES = search.LANES
PART = LANES * SUPER  # weights that go through together
F = np.float32


@kernel
def mean_squares(x, columns, factor, squares):  # type: ignore[no-untyped-def]
    """Store the mean square of each run of `columns` weights, times `factor`, summed in order, as C's loop does.

    Four sums go on side by side, since each addition waits for the one before it.
    """
    count = x.size // columns
    for first in range(0, count, 4):
        a, b, c, d = F(0), F(0), F(0), F(0)
        p, q = first * columns, min(first + 1, count - 1) * columns
        r, s = min(first + 2, count - 1) * columns, min(first + 3, count - 1) * columns
        for i in range(columns):
            a += x[p + i] * x[p + i]
            b += x[q + i] * x[q + i]
            c += x[r + i] * x[r + i]
            d += x[s + i] * x[s + i]
        for k, total in enumerate((a, b, c, d)):
            if first + k < count:
                squares[first + k] = factor * total / F(columns)


@kernel
def _lane_squares(squares, first, per, found):  # type: ignore[no-untyped-def]
    """Give each of LANES sub-blocks, `per` to a super-block, the square of its own; the first is that of `first`."""
    for lane in range(LANES):
        found[lane] = squares[first + lane // per]


@kernel
def _by_super_block(values, first, per, rows):  # type: ignore[no-untyped-def]
    """Put numbers of LANES sub-blocks into rows (per, LANES), a lane for each super-block."""
    for lane in range(LANES):
        rows[lane % per * LANES + first + lane // per] = values[lane]


@kernel
def _byte(code):  # type: ignore[no-untyped-def]
    return np.int32(code) & np.int32(255)


@kernel
def _put_scales_of_6_bits(steps, low_steps, d, m, lane, most, out, at, scales, lows):  # type: ignore[no-untyped-def]
    """Store d, dmin and the twelve bytes of scales of one super-block of Q4_K or Q5_K at `at`.

    steps, low_steps: rows (8, LANES), of which `lane` is meant. scales and lows (8) become what was stored. A line that
    falls has a negative scale, whose code wraps to more than 63: in Q5_K it is then 63, the `most`, and in Q4_K all its
    bits are stored.
    """
    d, m = put_half(out, at, d), put_half(out, at + 2, m)
    for j in range(8):
        s, low = min(most, _byte(steps[j * LANES + lane])), min(most, _byte(low_steps[j * LANES + lane]))
        if j < 4:
            out[at + 4 + j], out[at + 8 + j] = np.uint8(s), np.uint8(low)
        else:
            out[at + 8 + j] = np.uint8((s & 15) | ((low & 15) << 4))
            out[at + j] |= np.uint8(((s >> 4) << 6) & 255)
            out[at + 4 + j] |= np.uint8(((low >> 4) << 6) & 255)
    for j in range(8):
        if j < 4:
            s, low = np.int32(out[at + 4 + j]) & 63, np.int32(out[at + 8 + j]) & 63
        else:
            both = np.int32(out[at + 8 + j])
            s = (both & 15) | ((np.int32(out[at + j]) >> 6) << 4)
            low = (both >> 4) | ((np.int32(out[at + 4 + j]) >> 6) << 4)
        scales[j], lows[j] = d * F(s), m * F(low)


@inlined
def _q45_k(x, importance, out, find, finish, put, size, most):  # type: ignore[no-untyped-def]
    """Encode at most LANES super-blocks of Q4_K or Q5_K.

    `find` searches a line, `finish` finds the codes again, and `put` stores those of a super-block of `size` bytes.
    """
    xt, it, codes = aligned_floats(PART), aligned_floats(32 * LANES), aligned_floats(PART)
    weights, sums, squares = aligned_floats(32 * LANES), aligned_floats(LANES), aligned_floats(LANES)
    scales, lows, lane_squares = aligned_floats(PART // 32), aligned_floats(PART // 32), aligned_floats(LANES)
    scale_rows, low_rows, sum_rows = aligned_floats(8 * LANES), aligned_floats(8 * LANES), aligned_floats(8 * LANES)
    steps, low_steps = aligned_floats(8 * LANES), aligned_floats(8 * LANES)
    d, m = aligned_floats(LANES), aligned_floats(LANES)
    small, ordered = np.empty(32 * LANES, np.uint8), np.empty(32 * LANES, np.uint8)
    count, per = x.size // SUPER, LANES // 8
    squares[:] = F(0)
    mean_squares(x, SUPER, F(2), squares)
    for b in range(8):
        first, found, all_ = b * per, slice(b * LANES, (b + 1) * LANES), slice(b * 32 * LANES, (b + 1) * 32 * LANES)
        spread(x, first * SUPER, 32, xt[all_])
        spread(importance, first * SUPER, 32, it)
        _lane_squares(squares, first, 8, lane_squares)
        weighted.weigh_32(xt[all_], it, lane_squares, weights, sums)
        find(xt[all_], weights, codes[all_], scales[found], lows[found])
        _by_super_block(scales[found], first, 8, scale_rows)
        _by_super_block(-lows[found], first, 8, low_rows)
        _by_super_block(sums, first, 8, sum_rows)
    weighted.steps_8_63(scale_rows, sum_rows, steps, d)
    weighted.steps_8_63(low_rows, sum_rows, low_steps, m)
    for k in range(count):
        _put_scales_of_6_bits(steps, low_steps, d[k], m[k], k, most, out, k * size, scales[k * 8 :], lows[k * 8 :])
    for b in range(-(-count // per)):
        first, found, all_ = b * per, slice(b * LANES, (b + 1) * LANES), slice(b * 32 * LANES, (b + 1) * 32 * LANES)
        finish(xt[all_], codes[all_], scales[found], lows[found], small)
        order(small, 32, ordered)
        for s in range(min(per, count - first)):
            put(ordered, s * SUPER, out, (first + s) * size)


@kernel
def _put_q4(ordered, first, out, at):  # type: ignore[no-untyped-def]
    for j in range(4):
        merge(ordered, first + 64 * j, 32, 0, 4, 2, out, at + 16 + 32 * j)


@kernel
def _put_q5(ordered, first, out, at):  # type: ignore[no-untyped-def]
    merge(ordered, first, 32, 4, 1, 8, out, at + 16)
    for j in range(4):
        merge(ordered, first + 64 * j, 32, 0, 4, 2, out, at + 48 + 32 * j)


@kernel
def _find_q4(x, weights, codes, scales, lows):  # type: ignore[no-untyped-def]
    line.search_32_15(x, weights, codes, scales, lows)


@kernel
def _find_q5(x, weights, codes, scales, lows):  # type: ignore[no-untyped-def]
    line.search_32_31(x, weights, codes, scales, lows)


@kernel
def _finish_q4(x, codes, scales, lows, small):  # type: ignore[no-untyped-def]
    search.finish_q4(x, codes, scales, lows, small)


@kernel
def _finish_q5(x, codes, scales, lows, small):  # type: ignore[no-untyped-def]
    search.finish_q5(x, codes, scales, lows, small)


@kernel
def _some_q4_k(x, importance, out):  # type: ignore[no-untyped-def]
    _q45_k(x, importance, out, _find_q4, _finish_q4, _put_q4, 144, np.int32(255))


@kernel
def _some_q5_k(x, importance, out):  # type: ignore[no-untyped-def]
    _q45_k(x, importance, out, _find_q5, _finish_q5, _put_q5, 176, np.int32(63))


@kernel
def _some_q2_k(x, importance, out):  # type: ignore[no-untyped-def]
    xt, it, codes = aligned_floats(PART), aligned_floats(16 * LANES), aligned_floats(PART)
    weights, sums, squares = aligned_floats(16 * LANES), aligned_floats(LANES), aligned_floats(LANES)
    scales, lows, lane_squares = aligned_floats(PART // 16), aligned_floats(PART // 16), aligned_floats(LANES)
    scale_rows, low_rows, sum_rows = aligned_floats(16 * LANES), aligned_floats(16 * LANES), aligned_floats(16 * LANES)
    steps, low_steps = aligned_floats(16 * LANES), aligned_floats(16 * LANES)
    d, m = aligned_floats(LANES), aligned_floats(LANES)
    small, ordered = np.empty(16 * LANES, np.uint8), np.empty(16 * LANES, np.uint8)
    count, per = x.size // SUPER, LANES // 16
    squares[:] = F(0)
    mean_squares(x, SUPER, F(1), squares)
    for b in range(16):
        first, found, all_ = b * per, slice(b * LANES, (b + 1) * LANES), slice(b * 16 * LANES, (b + 1) * 16 * LANES)
        spread(x, first * SUPER, 16, xt[all_])
        spread(importance, first * SUPER, 16, it)
        _lane_squares(squares, first, 16, lane_squares)
        weighted.weigh_16(xt[all_], it, lane_squares, weights, sums)
        line.search_16_3(xt[all_], weights, codes[all_], scales[found], lows[found])
        _by_super_block(scales[found], first, 16, scale_rows)
        _by_super_block(-lows[found], first, 16, low_rows)
        _by_super_block(sums, first, 16, sum_rows)
    weighted.steps_16_15(scale_rows, sum_rows, steps, d)
    weighted.steps_16_15(low_rows, sum_rows, low_steps, m)
    for k in range(count):
        at = k * 84
        high, low = put_half(out, at + 80, d[k]), put_half(out, at + 82, m[k])
        for j in range(16):
            both = (_byte(steps[j * LANES + k]) | (_byte(low_steps[j * LANES + k]) << 4)) & 255
            out[at + j] = np.uint8(both)
            scales[k * 16 + j], lows[k * 16 + j] = high * F(both & 15), low * F(both >> 4)
    for b in range(-(-count // per)):
        first, found, all_ = b * per, slice(b * LANES, (b + 1) * LANES), slice(b * 16 * LANES, (b + 1) * 16 * LANES)
        search.finish_q2(xt[all_], codes[all_], scales[found], lows[found], small)
        order(small, 16, ordered)
        for s in range(min(per, count - first)):
            quarters(ordered, s * SUPER, out, (first + s) * 84 + 16, 0)


@kernel
def _some_q3_k(x, importance, out):  # type: ignore[no-untyped-def]
    xt, it, codes = aligned_floats(PART), aligned_floats(16 * LANES), aligned_floats(PART)
    weights, sums, squares = aligned_floats(16 * LANES), aligned_floats(LANES), aligned_floats(LANES)
    scales, lane_squares, terms = aligned_floats(PART // 16), aligned_floats(LANES), aligned_floats(32 * LANES)
    scale_rows, sum_rows, steps = aligned_floats(16 * LANES), aligned_floats(16 * LANES), aligned_floats(16 * LANES)
    d, lows = aligned_floats(LANES), np.zeros(LANES, F)
    small, ordered = np.empty(16 * LANES, np.uint8), np.empty(16 * LANES, np.uint8)
    count, per = x.size // SUPER, LANES // 16
    squares[:] = F(0)
    mean_squares(x, SUPER, F(2), squares)
    for b in range(16):
        first, found, all_ = b * per, slice(b * LANES, (b + 1) * LANES), slice(b * 16 * LANES, (b + 1) * 16 * LANES)
        spread(x, first * SUPER, 16, xt[all_])
        spread(importance, first * SUPER, 16, it)
        _lane_squares(squares, first, 16, lane_squares)
        weighted.weigh_16(xt[all_], it, lane_squares, weights, sums)
        weighted.fit_16_4(xt[all_], weights, terms, codes[all_], scales[found])
        _by_super_block(scales[found], first, 16, scale_rows)
        _by_super_block(sums, first, 16, sum_rows)
    weighted.fit_16_32(scale_rows, sum_rows, terms, steps, d)
    for k in range(count):
        at = k * 110
        high = put_half(out, at + 108, d[k])
        out[at + 96 : at + 108] = 0
        for j in range(16):
            scale = np.int32(steps[j * LANES + k])
            out[at + 96 + j % 8] |= np.uint8((scale & 15) << (4 * (j // 8)))
            out[at + 104 + j % 4] |= np.uint8((scale >> 4) << (2 * (j // 4)))
            scales[k * 16 + j] = high * F(scale - 32)
    for b in range(-(-count // per)):
        first, found, all_ = b * per, slice(b * LANES, (b + 1) * LANES), slice(b * 16 * LANES, (b + 1) * 16 * LANES)
        search.finish_q3(xt[all_], codes[all_], scales[found], lows, small)
        order(small, 16, ordered)
        for s in range(min(per, count - first)):
            at = (first + s) * 110
            merge(ordered, s * SUPER, 32, 2, 1, 8, out, at)
            quarters(ordered, s * SUPER, out, at + 32, 0)


@kernel
def encode_q6_k(x, importance, out):  # type: ignore[no-untyped-def]
    xt, it, codes, terms = (aligned_floats(16 * LANES), aligned_floats(16 * LANES), aligned_floats(16 * LANES),
                            aligned_floats(32 * LANES))  # fmt: skip
    scales, lows, are_nothing = aligned_floats(LANES), np.zeros(LANES, F), np.empty(LANES // 16, np.bool_)
    small, ordered = np.empty(16 * LANES, np.uint8), np.empty(16 * LANES, np.uint8)
    count, per = x.size // SUPER, LANES // 16
    for first in range(0, count, per):
        spread(x, first * SUPER, 16, xt)
        spread(importance, first * SUPER, 16, it)
        weighted.fit_16_32(xt, it, terms, codes, scales)
        here = min(per, count - first)
        for s in range(here):
            are_nothing[s] = scales_of_q6(scales, s * 16, out, (first + s) * 210)
        search.finish_q6(xt, codes, scales, lows, small)
        order(small, 16, ordered)
        for s in range(here):
            k_quants.put_q6(ordered, s * SUPER, are_nothing[s], out, (first + s) * 210)


@inlined
def _by_parts(x, importance, out, encode, size):  # type: ignore[no-untyped-def]
    """Encode LANES super-blocks, of `size` bytes each, at a time."""
    for start in range(0, x.size, PART):
        stop = min(start + PART, x.size)
        encode(x[start:stop], importance[start:stop], out[start // SUPER * size : stop // SUPER * size])


@kernel
def encode_q2_k(x, importance, out):  # type: ignore[no-untyped-def]
    _by_parts(x, importance, out, _some_q2_k, 84)


@kernel
def encode_q3_k(x, importance, out):  # type: ignore[no-untyped-def]
    _by_parts(x, importance, out, _some_q3_k, 110)


@kernel
def encode_q4_k(x, importance, out):  # type: ignore[no-untyped-def]
    _by_parts(x, importance, out, _some_q4_k, 144)


@kernel
def encode_q5_k(x, importance, out):  # type: ignore[no-untyped-def]
    _by_parts(x, importance, out, _some_q5_k, 176)
