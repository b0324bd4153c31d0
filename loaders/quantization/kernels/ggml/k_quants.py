"""Encoders of ggml's K-quants, super-blocks of 256 weights: Q2_K to Q6_K, byte for byte as its reference quantizers.

A sub-block is 16 weights, of Q4_K and Q5_K 32, with a scale s (and a minimum m) of its own. In order, with their bytes:
    Q2_K   scales and minima of 4 bits (16), codes (64), d, dmin                             w = d s q - dmin m
    Q3_K   high bits (32), low two bits (64), scales of 6 bits (12), d                       w = d (s - 32) (q - 4)
    Q4_K   d, dmin, scales and minima of 6 bits (12), codes (128)                            w = d s q - dmin m
    Q5_K   d, dmin, scales and minima of 6 bits (12), fifth bits (32), low four bits (128)   w = d s q - dmin m
    Q6_K   low four bits (128), high two bits (64), int8 scales (16), d                      w = d s (q - 32)
d and dmin are float16. The searches for scales are in search.py and search_line.py; a sub-block whose stored scale is
zero keeps the codes of the search.

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_q2_K_ref to quantize_row_q6_K_ref.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.ggml import search
from loaders.quantization.kernels.ggml import search_line as line
from loaders.quantization.kernels.intrinsics import aligned_floats, half_bits, half_value, transpose
from loaders.quantization.kernels.lanes import I8, Array, Lanes, Value, inlined, kernel, vector

SUPER = 256  # weights in a super-block
PART = 64  # super-blocks widened to float32 at once: 64 KiB, which stay in the cache until they are searched
LANES = search.LANES
EIGHTHS, SIXTEENTHS = LANES // 8, LANES // 16  # super-blocks that fill the lanes, by the number of their sub-blocks
F = np.float32
NOTHING = np.float32(search.NOTHING)


@vector(types.void)
def _widen(lanes: Lanes, x: Array, at: Value, values: Array) -> None:
    """Write 32 weights from `at` on as float32."""
    lanes.store(lanes.floats(x, at, 32), values, at)


@kernel
def to_floats(x, values):  # type: ignore[no-untyped-def]
    """Write raw weights (n,), n a multiple of 32, as float32 into values."""
    for at in range(0, x.size, 32):
        _widen(x, at, values)


@kernel
def nearest(value):  # type: ignore[no-untyped-def]
    """Return ggml's nearest_int, unclamped: what is beyond 2^22 comes out as the bits make it, as in ggml."""
    bits = np.float32(value + np.float32(12582912.0)).view(np.int32)
    return np.int32(bits & np.int32(0x7FFFFF)) - np.int32(0x400000)


@kernel
def spread(x, start, n, xt):  # type: ignore[no-untyped-def]
    """Write LANES sub-blocks of n weights from `start` on into xt (n, LANES), a lane each; zeros beyond x's end."""
    for first in range(0, LANES, 16):
        at = start + first * n
        whole = (x.size - at) // n
        for i in range(0, n, 16):
            if whole >= 16:
                transpose(x, at + i, n, xt, i * LANES + first, LANES)
                continue
            for lane in range(16):
                for j in range(i, i + 16):
                    xt[j * LANES + first + lane] = x[at + lane * n + j] if lane < whole else np.float32(0)


@vector(types.void)
def order(lanes: Lanes, small: Array, n: Value, codes: Array) -> None:
    """Transpose codes (n, LANES), uint8, into (LANES, n), so that a sub-block's codes lie together again."""
    row = ir.Constant(n.type, LANES)

    def turn(at: Value) -> list[Value]:
        for first in range(0, LANES, 16):
            places = [lanes.op("add", lanes.b.mul(lanes.op("add", at, i), row), first) for i in range(16)]
            for lane, found in enumerate(lanes.transposed([lanes.load(small, place, 16) for place in places])):
                lanes.store(found, codes, lanes.b.add(lanes.op("mul", n, first + lane), at))
        return []

    lanes.fold(ir.Constant(n.type, 0), n, 16, [], turn)


@vector(types.void)
def merge(
    lanes: Lanes,
    codes: Array,
    at: Value,
    apart: Value,
    shift: Value,
    width: Value,
    count: Value,
    out: Array,
    to: Value,
) -> None:
    """Store 32 bytes of `count` fields, the first the lowest: `width` bits, from bit `shift` on, of a code each.

    The codes of one byte lie `apart` from each other; those of the first byte begin at `at`.
    """
    kind, one = ir.VectorType(I8, 32), ir.Constant(width.type, 1)

    def wide(number: Value) -> Value:
        return lanes.splat(lanes.b.trunc(number, I8), 32)

    mask = wide(lanes.b.sub(lanes.b.shl(one, width), one))

    def add(k: Value, found: Value) -> list[Value]:
        field = lanes.load(codes, lanes.b.add(at, lanes.b.mul(apart, k)), 32)
        field = lanes.b.and_(lanes.b.lshr(field, wide(shift)), mask)
        return [lanes.b.or_(found, lanes.b.shl(field, wide(lanes.b.mul(width, k))))]

    [found] = lanes.fold(ir.Constant(count.type, 0), count, 1, [lanes.const(kind, 0)], add)
    lanes.store(found, out, to)


@kernel
def put_half(out, at, value):  # type: ignore[no-untyped-def]
    """Store a number as float16 at byte `at`, and return what it became: ggml finds codes by the stored scales."""
    bits = half_bits(np.float32(value))
    out[at], out[at + 1] = np.uint8(bits & np.uint16(255)), np.uint8(bits >> np.uint16(8))
    return half_value(bits)


@kernel
def _scales_of_6_bits(scales, lows, first, out, at):  # type: ignore[no-untyped-def]
    """Store d, dmin and the twelve bytes of scales of one super-block of Q4_K or Q5_K at `at`.

    Its sub-blocks are eight from `first` on. scales and lows become what was stored. `& 255` is C's cast to uint8_t.
    """
    top, under = np.float32(0), np.float32(0)
    for k in range(first, first + 8):
        top = max(top, scales[k])
        under = max(under, np.float32(-lows[k]))
    up = np.float32(63) / top if top > 0 else np.float32(0)
    down = np.float32(63) / under if under > 0 else np.float32(0)
    d = put_half(out, at, top / np.float32(63))
    dmin = put_half(out, at + 2, under / np.float32(63))
    for j in range(8):
        k = first + j
        s = min(np.int32(63), nearest(up * scales[k]) & np.int32(255))
        m = min(np.int32(63), nearest(down * np.float32(-lows[k])) & np.int32(255))
        if j < 4:
            out[at + 4 + j], out[at + 8 + j] = np.uint8(s), np.uint8(m)
        else:
            out[at + 8 + j] = np.uint8((s & 15) | ((m & 15) << 4))
            out[at + j] |= np.uint8((s >> 4) << 6)
            out[at + 4 + j] |= np.uint8((m >> 4) << 6)
        scales[k], lows[k] = d * np.float32(s), dmin * np.float32(m)


@kernel
def _q4_k(x, out):  # type: ignore[no-untyped-def]
    """Encode Q4_K, 144 bytes a super-block. x: float32."""
    xt, weights, codes = aligned_floats(32 * LANES), aligned_floats(32 * LANES), aligned_floats(32 * LANES)
    scales, lows = aligned_floats(LANES), aligned_floats(LANES)
    small, ordered = np.empty(32 * LANES, np.uint8), np.empty(32 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, EIGHTHS):
        spread(x, first * SUPER, 32, xt)
        line.search_q4(xt, weights, codes, scales, lows)
        here = min(EIGHTHS, count - first)
        for s in range(here):
            _scales_of_6_bits(scales, lows, s * 8, out, (first + s) * 144)
        search.finish_q4(xt, codes, scales, lows, small)
        order(small, 32, ordered)
        for s in range(here):
            for j in range(4):
                merge(ordered, s * SUPER + 64 * j, 32, 0, 4, 2, out, (first + s) * 144 + 16 + 32 * j)


@kernel
def _q5_k(x, out):  # type: ignore[no-untyped-def]
    """Encode Q5_K, 176 bytes a super-block. x: float32."""
    xt, weights, codes = aligned_floats(32 * LANES), aligned_floats(32 * LANES), aligned_floats(32 * LANES)
    scales, lows = aligned_floats(LANES), aligned_floats(LANES)
    small, ordered = np.empty(32 * LANES, np.uint8), np.empty(32 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, EIGHTHS):
        spread(x, first * SUPER, 32, xt)
        line.search_q5(xt, weights, codes, scales, lows)
        here = min(EIGHTHS, count - first)
        for s in range(here):
            _scales_of_6_bits(scales, lows, s * 8, out, (first + s) * 176)
        search.finish_q5(xt, codes, scales, lows, small)
        order(small, 32, ordered)
        for s in range(here):
            at = (first + s) * 176
            merge(ordered, s * SUPER, 32, 4, 1, 8, out, at + 16)
            for j in range(4):
                merge(ordered, s * SUPER + 64 * j, 32, 0, 4, 2, out, at + 48 + 32 * j)


@kernel
def _scales_of_4_bits(scales, lows, first, out, at):  # type: ignore[no-untyped-def]
    """Store d, dmin and the scales of one super-block of Q2_K at `at`.

    Its sub-blocks are sixteen from `first` on. scales and lows become what was stored.
    """
    top, under = np.float32(0), np.float32(0)
    for k in range(first, first + 16):
        top = max(top, scales[k])
        under = max(under, np.float32(-lows[k]))
    d = put_half(out, at + 80, top / np.float32(15) if top > 0 else np.float32(0))
    dmin = put_half(out, at + 82, under / np.float32(15) if under > 0 else np.float32(0))
    for j in range(16):
        k, both = first + j, np.int32(0)
        if top > 0:
            both = nearest(np.float32(15) / top * scales[k]) & np.int32(255)
        if under > 0:
            low = np.float32(15) / under * np.float32(-lows[k])
            both |= (nearest(low) << np.int32(4)) & np.int32(255)
        out[at + j] = np.uint8(both)
        scales[k], lows[k] = d * np.float32(both & 15), dmin * np.float32(both >> 4)


@kernel
def quarters(codes, first, out, at, shift):  # type: ignore[no-untyped-def]
    """Store two bits, from `shift` on, of 256 codes from `first` on.

    Byte l of a half holds its weights l, l + 32, l + 64, l + 96.
    """
    for half in range(2):
        merge(codes, first + 128 * half, 32, shift, 2, 4, out, at + 32 * half)


@kernel
def _q2_k(x, out):  # type: ignore[no-untyped-def]
    """Encode Q2_K, 84 bytes a super-block. x: float32."""
    xt, weights, codes = aligned_floats(16 * LANES), aligned_floats(16 * LANES), aligned_floats(16 * LANES)
    scales, lows = aligned_floats(LANES), aligned_floats(LANES)
    small, ordered = np.empty(16 * LANES, np.uint8), np.empty(16 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, SIXTEENTHS):
        spread(x, first * SUPER, 16, xt)
        line.search_q2(xt, weights, codes, scales, lows)
        here = min(SIXTEENTHS, count - first)
        for s in range(here):
            _scales_of_4_bits(scales, lows, s * 16, out, (first + s) * 84)
        search.finish_q2(xt, codes, scales, lows, small)
        order(small, 16, ordered)
        for s in range(here):
            quarters(ordered, s * SUPER, out, (first + s) * 84 + 16, 0)


@kernel
def _largest_scale(scales, first):  # type: ignore[no-untyped-def]
    """Return the scale of greatest magnitude among sixteen from `first` on, the first of equals, with its sign."""
    found, size = np.float32(0), np.float32(0)
    for k in range(first, first + 16):
        scale = scales[k]
        if abs(scale) > size:
            found, size = scale, abs(scale)
    return found


@kernel
def _scales_of_q3(scales, first, out, at):  # type: ignore[no-untyped-def]
    """Store d and the scales of 6 bits of one super-block of Q3_K at `at`; the scales become what was stored.

    Its sub-blocks are sixteen from `first` on.
    """
    top = _largest_scale(scales, first)
    inverse = np.float32(-32) / top if top != 0 else np.float32(0)
    d = put_half(out, at + 108, np.float32(1) / inverse if top != 0 else np.float32(0))
    out[at + 96 : at + 108] = 0
    for j in range(16):
        scale = np.int32(0)
        if top != 0:
            scale = np.int32(np.int8(nearest(inverse * scales[first + j])))
            scale = max(np.int32(-32), min(np.int32(31), scale)) + np.int32(32)
        out[at + 96 + j % 8] |= np.uint8((scale & 15) << (4 * (j // 8)))
        out[at + 104 + j % 4] |= np.uint8((scale >> 4) << (2 * (j // 4)))
        scales[first + j] = d * np.float32(scale - 32)


@kernel
def _q3_k(x, out):  # type: ignore[no-untyped-def]
    """Encode Q3_K, 110 bytes a super-block. x: float32."""
    xt, codes, lows = aligned_floats(16 * LANES), aligned_floats(16 * LANES), np.zeros(LANES, F)
    state, scales = aligned_floats(3 * LANES), aligned_floats(LANES)
    small, ordered = np.empty(16 * LANES, np.uint8), np.empty(16 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, SIXTEENTHS):
        spread(x, first * SUPER, 16, xt)
        search.begin_q3(xt, codes, state)
        for _ in range(5):  # make_q3_quants goes over the weights at most five times
            if search.improve_q3(xt, codes, state) == 0:
                break
        search.end_q3(codes, state, scales)
        here = min(SIXTEENTHS, count - first)
        for s in range(here):
            _scales_of_q3(scales, s * 16, out, (first + s) * 110)
        search.finish_q3(xt, codes, scales, lows, small)
        order(small, 16, ordered)
        for s in range(here):
            at = (first + s) * 110
            merge(ordered, s * SUPER, 32, 2, 1, 8, out, at)
            quarters(ordered, s * SUPER, out, at + 32, 0)


@kernel
def scales_of_q6(scales, first, out, at):  # type: ignore[no-untyped-def]
    """Store d and the int8 scales of one super-block of Q6_K at `at`; return whether it is nothing but zeros.

    Its sub-blocks are sixteen from `first` on. The scales become what was stored.
    """
    top = _largest_scale(scales, first)
    is_nothing = abs(top) < NOTHING
    inverse = np.float32(0) if is_nothing else np.float32(-128) / top
    d = put_half(out, at + 208, np.float32(0) if is_nothing else np.float32(1) / inverse)
    for j in range(16):
        scale = min(np.int32(127), nearest(inverse * scales[first + j]))
        out[at + 192 + j] = np.uint8(scale & 255)
        scales[first + j] = d * np.float32(np.int8(scale))
    return is_nothing


@kernel
def put_q6(ordered, first, is_nothing, out, at):  # type: ignore[no-untyped-def]
    """Store the codes, from `first` on, of one super-block of Q6_K at `at`; zeros where it is nothing but zeros."""
    if is_nothing:
        out[at : at + 192] = 0
        return
    for part in range(4):  # each half of the weights fills bytes 0 to 31 and 32 to 63 of its low nibbles
        merge(ordered, first + part // 2 * 128 + part % 2 * 32, 64, 0, 4, 2, out, at + 32 * part)
    quarters(ordered, first, out, at + 128, 4)


@kernel
def _q6_k(x, out):  # type: ignore[no-untyped-def]
    """Encode Q6_K, 210 bytes a super-block. x: float32."""
    xt, codes, lows = aligned_floats(16 * LANES), aligned_floats(16 * LANES), np.zeros(LANES, F)
    terms = aligned_floats(32 * LANES)
    scales, are_nothing = aligned_floats(LANES), np.empty(SIXTEENTHS, np.bool_)
    small, ordered = np.empty(16 * LANES, np.uint8), np.empty(16 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, SIXTEENTHS):
        spread(x, first * SUPER, 16, xt)
        search.search_q6(xt, terms, codes, scales)
        here = min(SIXTEENTHS, count - first)
        for s in range(here):
            are_nothing[s] = scales_of_q6(scales, s * 16, out, (first + s) * 210)
        search.finish_q6(xt, codes, scales, lows, small)
        order(small, 16, ordered)
        for s in range(here):
            put_q6(ordered, s * SUPER, are_nothing[s], out, (first + s) * 210)


@inlined
def _by_parts(x, out, encode, size):  # type: ignore[no-untyped-def]
    """Encode raw weights of any dtype by what encodes float32s: a search is compiled once, and linked for each dtype.

    x: (n,), n a multiple of 256; out: uint8 (n / 256 * size,).
    """
    values = aligned_floats(PART * SUPER)
    for start in range(0, x.size, values.size):
        some = x[start : start + values.size]
        to_floats(some, values[: some.size])
        encode(values[: some.size], out[start // SUPER * size :])


@kernel
def encode_q2_k(x, out):  # type: ignore[no-untyped-def]
    _by_parts(x, out, _q2_k, 84)


@kernel
def encode_q3_k(x, out):  # type: ignore[no-untyped-def]
    _by_parts(x, out, _q3_k, 110)


@kernel
def encode_q4_k(x, out):  # type: ignore[no-untyped-def]
    _by_parts(x, out, _q4_k, 144)


@kernel
def encode_q5_k(x, out):  # type: ignore[no-untyped-def]
    _by_parts(x, out, _q5_k, 176)


@kernel
def encode_q6_k(x, out):  # type: ignore[no-untyped-def]
    _by_parts(x, out, _q6_k, 210)
