"""ggml's super-blocks of 256 weights: Q2_K to Q6_K, TQ1_0 and TQ2_0, byte for byte as its reference quantizers.

By bytes (l, j count within what stands before them; sub-blocks are 16 or 32 weights, each with a small scale):
    Q2_K   16 scales and minima of 4 bits, 64 codes, d, dmin                       w = d s q - dmin m
    Q3_K   32 high bits, 64 low codes, 12 scales of 6 bits, d                      w = d (s - 32) (q - 4)
    Q4_K   d, dmin, 12 scales and minima of 6 bits, 128 codes                      w = d s q - dmin m
    Q5_K   d, dmin, 12 scales and minima of 6 bits, 32 fifth bits, 128 codes       w = d s q - dmin m
    Q6_K   128 low codes, 64 high codes, 16 int8 scales, d                         w = d s (q - 32)
    TQ1_0  48 bytes of five trits, 4 of four, d                                    w = d (q - 1)
    TQ2_0  64 bytes of four codes, d                                               w = d (q - 1)
d and dmin are float16. Scales come from kernels/ggml_search.py; sub-blocks whose stored scale is zero keep the codes of
the search. The ternary ones divide by the largest magnitude, and round half away from zero.

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_*_ref.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import ggml_search as search
from loaders.quantization.kernels.compare import float_at
from loaders.quantization.kernels.ggml_blocks import ROUND_AWAY
from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, half_bits, half_value, kernel, vector

SUPER = 256
LANES = search.LANES
SCALE, LOW = search.SCALE, search.LOW
F = np.float32
NOTHING = np.float32(search.NOTHING)


@kernel
def _nearest(value):  # type: ignore[no-untyped-def]
    """The nearest_int of ggml, as its bits make it."""
    bits = np.float32(value + np.float32(12582912.0)).view(np.int32)
    return np.int32(bits & np.int32(0x7FFFFF)) - np.int32(0x400000)


@kernel
def _spread(x, start, n, xt):  # type: ignore[no-untyped-def]
    """LANES sub-blocks of n weights from `start` on, a lane each; beyond the end of x, zeros."""
    here = min(LANES, (x.size - start) // n)
    for i in range(n):
        for k in range(here):
            xt[i * LANES + k] = float_at(x, start + k * n + i)
        for k in range(here, LANES):
            xt[i * LANES + k] = np.float32(0)


@kernel
def _put_half(out, at, value):  # type: ignore[no-untyped-def]
    """Store as float16; gives what it now is."""
    bits = half_bits(np.float32(value))
    out[at], out[at + 1] = np.uint8(bits & np.uint16(255)), np.uint8(bits >> np.uint16(8))
    return half_value(bits)


@kernel
def _scales_of_6_bits(state, first, out, at, scales, lows):  # type: ignore[no-untyped-def]
    """Of one super-block of Q4_K or Q5_K: d, dmin and the twelve bytes at `at`; scales and lows as they are stored."""
    top, under = np.float32(0), np.float32(0)
    for k in range(first, first + 8):
        top = max(top, state[SCALE * LANES + k])
        under = max(under, np.float32(-state[LOW * LANES + k]))
    up = np.float32(63) / top if top > 0 else np.float32(0)
    down = np.float32(63) / under if under > 0 else np.float32(0)
    d = _put_half(out, at, top / np.float32(63))
    dmin = _put_half(out, at + 2, under / np.float32(63))
    for j in range(8):
        k = first + j
        s = min(np.int32(63), _nearest(up * state[SCALE * LANES + k]) & np.int32(255))
        m = min(np.int32(63), _nearest(down * np.float32(-state[LOW * LANES + k])) & np.int32(255))
        if j < 4:
            out[at + 4 + j], out[at + 8 + j] = np.uint8(s), np.uint8(m)
        else:
            out[at + 8 + j] = np.uint8((s & 15) | ((m & 15) << 4))
            out[at + j] |= np.uint8((s >> 4) << 6)
            out[at + 4 + j] |= np.uint8((m >> 4) << 6)
        scales[k], lows[k] = d * np.float32(s), dmin * np.float32(m)


@kernel
def encode_q4_k(x, out):  # type: ignore[no-untyped-def]
    """x: (n,), n a multiple of 256; out: uint8 (n / 256 * 144,)."""
    xt, weights, codes = np.empty(32 * LANES, F), np.empty(32 * LANES, F), np.empty(32 * LANES, F)
    state, scales, lows = np.empty(search.STATE_ROWS * LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    small = np.empty(32 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, 4):
        _spread(x, first * SUPER, 32, xt)
        search.begin_q4(xt, weights, state)
        for step in range(21):
            reach = np.float32(np.float32(-1) + np.float32(0.1) * np.float32(step)) + np.float32(15)
            search.try_q4(xt, weights, codes, state, np.float32(reach))
        search.end_q4(xt, codes, state)
        here = min(4, count - first)
        for s in range(here):
            _scales_of_6_bits(state, s * 8, out, (first + s) * 144, scales, lows)
        search.finish_q4(xt, codes, scales, lows, small)
        for s in range(here):
            at = (first + s) * 144 + 16
            for i in range(32):
                pairs = small[i * LANES + s * 8 : i * LANES + s * 8 + 8]
                for j in range(4):
                    out[at + 32 * j + i] = pairs[2 * j] | np.uint8(pairs[2 * j + 1] << np.uint8(4))


@kernel
def encode_q5_k(x, out):  # type: ignore[no-untyped-def]
    """out: uint8 (n / 256 * 176,)."""
    xt, weights, codes = np.empty(32 * LANES, F), np.empty(32 * LANES, F), np.empty(32 * LANES, F)
    state, scales, lows = np.empty(search.STATE_ROWS * LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    small = np.empty(32 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, 4):
        _spread(x, first * SUPER, 32, xt)
        search.begin_q5(xt, weights, state)
        for step in range(16):
            reach = np.float32(np.float32(-0.5) + np.float32(0.1) * np.float32(step)) + np.float32(31)
            search.try_q5(xt, weights, codes, state, np.float32(reach))
        search.end_q5(xt, codes, state)
        here = min(4, count - first)
        for s in range(here):
            _scales_of_6_bits(state, s * 8, out, (first + s) * 176, scales, lows)
        search.finish_q5(xt, codes, scales, lows, small)
        for s in range(here):
            at = (first + s) * 176 + 16
            for i in range(32):
                fifth = np.uint8(0)
                for j in range(8):
                    code = small[i * LANES + s * 8 + j]
                    fifth |= np.uint8((code >> np.uint8(4)) << np.uint8(j))
                    nibble = code & np.uint8(15)
                    if j % 2 == 0:
                        out[at + 32 + 16 * j + i] = nibble
                    else:
                        out[at + 16 + 16 * j + i] |= np.uint8(nibble << np.uint8(4))
                out[at + i] = fifth


@kernel
def _scales_of_4_bits(state, first, out, at, scales, lows):  # type: ignore[no-untyped-def]
    """Of one super-block of Q2_K at `at`."""
    top, under = np.float32(0), np.float32(0)
    for k in range(first, first + 16):
        top = max(top, state[SCALE * LANES + k])
        under = max(under, np.float32(-state[LOW * LANES + k]))
    d = _put_half(out, at + 80, top / np.float32(15) if top > 0 else np.float32(0))
    dmin = _put_half(out, at + 82, under / np.float32(15) if under > 0 else np.float32(0))
    for j in range(16):
        k = first + j
        both = np.int32(0)
        if top > 0:
            both = _nearest(np.float32(15) / top * state[SCALE * LANES + k]) & np.int32(255)
        if under > 0:
            low = np.float32(15) / under * np.float32(-state[LOW * LANES + k])
            both |= (_nearest(low) << np.int32(4)) & np.int32(255)
        out[at + j] = np.uint8(both)
        scales[k], lows[k] = d * np.float32(both & 15), dmin * np.float32(both >> 4)


@kernel
def _quarters(small, first, out, at, shift):  # type: ignore[no-untyped-def]
    """Two bits, from `shift` on, of 256 codes: byte l of a half holds its weights l, l + 32, l + 64, l + 96."""
    for half in range(2):
        for i in range(32):
            packed = np.uint8(0)
            for q in range(4):
                j = half * 8 + q * 2 + i // 16
                code = (small[(i % 16) * LANES + first + j] >> np.uint8(shift)) & np.uint8(3)
                packed |= np.uint8(code << np.uint8(2 * q))
            out[at + 32 * half + i] = packed


@kernel
def encode_q2_k(x, out):  # type: ignore[no-untyped-def]
    """out: uint8 (n / 256 * 84,)."""
    xt, weights, codes = np.empty(16 * LANES, F), np.empty(16 * LANES, F), np.empty(16 * LANES, F)
    state, scales, lows = np.empty(search.STATE_ROWS * LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    small = np.empty(16 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, 2):
        _spread(x, first * SUPER, 16, xt)
        search.begin_q2(xt, weights, state)
        for step in range(16):
            reach = np.float32(np.float32(-0.5) + np.float32(0.1) * np.float32(step)) + np.float32(3)
            search.try_q2(xt, weights, codes, state, np.float32(reach))
        search.end_q2(xt, codes, state)
        here = min(2, count - first)
        for s in range(here):
            _scales_of_4_bits(state, s * 16, out, (first + s) * 84, scales, lows)
        search.finish_q2(xt, codes, scales, lows, small)
        for s in range(here):
            _quarters(small, s * 16, out, (first + s) * 84 + 16, 0)


@kernel
def _largest_scale(state, first):  # type: ignore[no-untyped-def]
    """Of sixteen scales that of greatest magnitude, the first of equals."""
    found, size = np.float32(0), np.float32(0)
    for k in range(first, first + 16):
        scale = state[SCALE * LANES + k]
        if abs(scale) > size:
            found, size = scale, abs(scale)
    return found


@kernel
def encode_q3_k(x, out):  # type: ignore[no-untyped-def]
    """out: uint8 (n / 256 * 110,)."""
    xt, codes, lows = np.empty(16 * LANES, F), np.empty(16 * LANES, F), np.zeros(LANES, F)
    state, scales = np.empty(search.STATE_ROWS * LANES, F), np.empty(LANES, F)
    small = np.empty(16 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, 2):
        _spread(x, first * SUPER, 16, xt)
        search.begin_q3(xt, codes, state)
        for _ in range(5):
            search.improve_q3(xt, codes, state)
        search.end_q3(codes, state)
        here = min(2, count - first)
        for s in range(here):
            at = (first + s) * 110
            top = _largest_scale(state, s * 16)
            inverse = np.float32(-32) / top if top != 0 else np.float32(0)
            d = _put_half(out, at + 108, np.float32(1) / inverse if top != 0 else np.float32(0))
            out[at + 96 : at + 108] = 0
            for j in range(16):
                k = s * 16 + j
                scale = np.int32(0)
                if top != 0:
                    scale = np.int32(np.int8(_nearest(inverse * state[SCALE * LANES + k])))
                    scale = max(np.int32(-32), min(np.int32(31), scale)) + np.int32(32)
                out[at + 96 + j % 8] |= np.uint8((scale & 15) << (4 * (j // 8)))
                out[at + 104 + j % 4] |= np.uint8((scale >> 4) << (2 * (j // 4)))
                scales[k] = d * np.float32(scale - 32)
        search.finish_q3(xt, codes, scales, lows, small)
        for s in range(here):
            at = (first + s) * 110
            for i in range(32):
                high = np.uint8(0)
                for q in range(8):
                    code = small[(i % 16) * LANES + s * 16 + q * 2 + i // 16]
                    high |= np.uint8((code >> np.uint8(2)) << np.uint8(q))
                out[at + i] = high
            _quarters(small, s * 16, out, at + 32, 0)


@kernel
def encode_q6_k(x, out):  # type: ignore[no-untyped-def]
    """out: uint8 (n / 256 * 210,)."""
    xt, codes, lows = np.empty(16 * LANES, F), np.empty(16 * LANES, F), np.zeros(LANES, F)
    state, scales = np.empty(search.STATE_ROWS * LANES, F), np.empty(LANES, F)
    small = np.empty(16 * LANES, np.uint8)
    count = x.size // SUPER
    for first in range(0, count, 2):
        _spread(x, first * SUPER, 16, xt)
        search.begin_q6(xt, state)
        for step in range(-9, 10):
            if step != 0:
                search.try_q6(xt, state, np.float32(32) + np.float32(np.float32(0.1) * np.float32(step)))
        search.end_q6(xt, codes, state)
        here = min(2, count - first)
        for s in range(here):
            at = (first + s) * 210
            top = _largest_scale(state, s * 16)
            is_nothing = abs(top) < NOTHING
            inverse = np.float32(0) if is_nothing else np.float32(-128) / top
            d = _put_half(out, at + 208, np.float32(0) if is_nothing else np.float32(1) / inverse)
            for j in range(16):
                k = s * 16 + j
                scale = min(np.int32(127), _nearest(inverse * state[SCALE * LANES + k]))
                out[at + 192 + j] = np.uint8(scale & 255)
                scales[k] = d * np.float32(np.int8(scale))
        search.finish_q6(xt, codes, scales, lows, small)
        for s in range(here):
            at = (first + s) * 210
            if abs(_largest_scale(state, s * 16)) < NOTHING:
                out[at : at + 192] = 0
                continue
            for half in range(2):
                for i in range(64):
                    j = s * 16 + half * 8 + i // 16
                    low, high = small[(i % 16) * LANES + j], small[(i % 16) * LANES + j + 4]
                    nibbles = (low & np.uint8(15)) | np.uint8((high & np.uint8(15)) << np.uint8(4))
                    out[at + 64 * half + i] = nibbles
            _quarters(small, s * 16, out, at + 128, 4)


# --- ternary


@vector(types.void)
def _trits(lanes: Lanes, x: Array, at: Value, inverse: Value, codes: Array) -> None:
    """roundf(x * inverse) + 1 of 256 weights, half away from zero, as bytes."""
    kind, wide = ir.VectorType(F32, 32), ir.VectorType(I32, 32)
    for part in range(SUPER // 32):
        v = lanes.b.fmul(lanes.floats(x, lanes.op("add", at, 32 * part), 32), lanes.splat(inverse, 32))
        nudge = lanes.op("or_", lanes.op("and_", lanes.b.bitcast(v, wide), -0x80000000), ROUND_AWAY)
        code = lanes.op("add", lanes.b.fptosi(lanes.b.fadd(v, lanes.b.bitcast(nudge, kind)), wide), 1)
        start = ir.Constant(ir.IntType(64), 32 * part)
        lanes.store(lanes.b.trunc(code, ir.VectorType(I8, 32)), codes, start)


@vector(types.float32)
def _largest(lanes: Lanes, x: Array, at: Value) -> Value:
    """The largest magnitude of 256 weights."""
    kind = ir.VectorType(F32, 32)
    top = lanes.const(kind, 0)
    for part in range(SUPER // 32):
        top = lanes.larger(lanes.absolute(lanes.floats(x, lanes.op("add", at, 32 * part), 32)), top)
    return lanes.reduce("fmax", top)


@kernel
def _begin_ternary(x, block, out, at, codes):  # type: ignore[no-untyped-def]
    top = _largest(x, block * SUPER)
    _put_half(out, at, top)
    inverse = np.float32(1) / top if top != 0 else np.float32(0)
    _trits(x, block * SUPER, inverse if inverse < np.inf else np.float32(0), codes)


@kernel
def encode_tq2_0(x, out):  # type: ignore[no-untyped-def]
    """out: uint8 (n / 256 * 66,)."""
    codes = np.empty(SUPER, np.uint8)
    for block in range(x.size // SUPER):
        at = block * 66
        _begin_ternary(x, block, out, at + 64, codes)
        for half in range(2):
            for i in range(32):
                c = codes[half * 128 + i : half * 128 + 128 : 32]
                packed = c[0] | (c[1] << np.uint8(2)) | (c[2] << np.uint8(4)) | (c[3] << np.uint8(6))
                out[at + 32 * half + i] = np.uint8(packed)


@kernel
def encode_tq1_0(x, out):  # type: ignore[no-untyped-def]
    """out: uint8 (n / 256 * 54,). A byte is the fraction that its trits are of 3^5, of 256, rounded up."""
    codes = np.empty(SUPER, np.uint8)
    for block in range(x.size // SUPER):
        at = block * 54
        _begin_ternary(x, block, out, at + 52, codes)
        for i in range(52):
            # 32 bytes take weights 32 apart, 16 take weights 16 apart, and 4 take four weights 4 apart
            first, step = (i, 32) if i < 32 else (160 + i - 32, 16) if i < 48 else (240 + i - 48, 4)
            trits = np.int32(0)
            for n in range(5):
                trits = trits * np.int32(3)
                if n < 4 or i < 48:
                    trits += np.int32(codes[first + n * step])
            out[at + i] = np.uint8((trits * np.int32(256) + np.int32(242)) // np.int32(243))
