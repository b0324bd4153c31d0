"""Encoders of Q4_0, Q4_1, Q5_0 and Q5_1 by an importance matrix, byte for byte as ggml's quantize_row_*_impl.

What a block holds is described in blocks.py. A weight's error counts by the importance of its input channel times the
root of the weight's own square and its row's mean square. Scale (and minimum) are those of a search, rounded to
float16; the codes are the search's own. LANES blocks go through side by side.

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_q4_0_impl to quantize_row_q5_1_impl.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.ggml import search
from loaders.quantization.kernels.ggml import search_line as line
from loaders.quantization.kernels.ggml import search_weighted as weighted
from loaders.quantization.kernels.ggml.k_quants import order, put_half, spread
from loaders.quantization.kernels.intrinsics import aligned_floats
from loaders.quantization.kernels.lanes import kernel

N = 32  # weights in a block
LANES = search.LANES
F = np.float32


@kernel
def _put_nibbles(codes, first, out, at):  # type: ignore[no-untyped-def]
    for j in range(16):
        out[at + j] = (codes[first + j] & np.uint8(15)) | np.uint8((codes[first + 16 + j] & np.uint8(15)) << 4)


@kernel
def _put_fifth_bits(codes, first, out, at):  # type: ignore[no-untyped-def]
    for k in range(4):
        bits = np.uint8(0)
        for j in range(8):
            bits |= np.uint8((codes[first + 8 * k + j] >> np.uint8(4)) << j)
        out[at + k] = bits


@kernel
def encode(x, importance, squares, start, columns, has_low, is_five, out):  # type: ignore[no-untyped-def]
    """Encode blocks of Q4_0; with `has_low` of Q4_1, with `is_five` of Q5_0, with both of Q5_1.

    x, importance: float32 (n,), of whole blocks, which begin `start` weights after that of the first of the rows that
    `squares` are of; out: uint8.
    """
    xt, it, weights, codes = (aligned_floats(N * LANES), aligned_floats(N * LANES), aligned_floats(N * LANES),
                              aligned_floats(N * LANES))  # fmt: skip
    terms, scales, lows = aligned_floats(2 * N * LANES), aligned_floats(LANES), aligned_floats(LANES)
    lane_squares, sums = aligned_floats(LANES), aligned_floats(LANES)
    small, ordered = np.empty(N * LANES, np.uint8), np.empty(N * LANES, np.uint8)
    head = (4 if has_low else 2) + (4 if is_five else 0)
    count, size = x.size // N, head + 16
    for first in range(0, count, LANES):
        spread(x, first * N, N, xt)
        spread(importance, first * N, N, it)
        for lane in range(LANES):
            lane_squares[lane] = squares[min((start + (first + lane) * N) // columns, squares.size - 1)]
        weighted.weigh_32(xt, it, lane_squares, weights, sums)
        if not has_low:
            if is_five:
                weighted.fit_32_16(xt, weights, terms, codes, scales)
            else:
                weighted.fit_32_8(xt, weights, terms, codes, scales)
        elif is_five:
            line.search_32_31(xt, weights, codes, scales, lows)
        else:
            line.search_32_15(xt, weights, codes, scales, lows)
        weighted.bytes_32(codes, small)
        order(small, N, ordered)
        for k in range(min(LANES, count - first)):
            at = (first + k) * size
            put_half(out, at, scales[k])
            if has_low:
                put_half(out, at + 2, lows[k])
            if is_five:
                _put_fifth_bits(ordered, k * N, out, at + head - 4)
            _put_nibbles(ordered, k * N, out, at + head)
