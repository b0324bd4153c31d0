"""Encoders of ggml's blocks of 32 weights: Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1, byte for byte as its reference.

A block begins with its scale d in float16 (in Q4_1 and Q5_1 also its least weight m):
    Q8_0   32 int8                                               w = d q
    Q4_0   16 bytes, weight j low and j + 16 high                w = d (q - 8)
    Q4_1   likewise                                              w = d q + m
    Q5_0   32 fifth bits as one uint32, then as Q4_0             w = d (q - 16)
    Q5_1   likewise                                              w = d q + m
All arithmetic is float32, in the order of quantize_row_*_ref (llama.cpp, ggml/src/ggml-quants.c), and as x86-64 builds
of ggml do it: products are not fused into sums. Codes are found by the scale before it is rounded to float16, and casts
to integers truncate. A scale so small that its inverse is infinite makes C's cast undefined; x86 gives code 0, and so
do these encoders.

Blocks go through in batches, so that the scales of sixteen are computed side by side.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import rounding
from loaders.quantization.kernels.lanes import F32, I8, I16, I32, Array, Lanes, Value, kernel, vector

N = 32  # weights in a block
BATCH = 16  # blocks whose scales are computed at once, a lane each
# The bits of the last float32 below one half. With the sign of a number, it is what to add before the number is cut to
# an integer, for roundf's half away from zero: one half itself would also lift 0.49999997 to 1.
ROUND_AWAY = 0x3EFFFFFF


def _bits(lanes: Lanes, x: Array, at: Value) -> Value:
    """Load a block's raw bits as integers of 16 or 32 bits."""
    bits = lanes.load(x, at, N)
    return lanes.b.bitcast(bits, ir.VectorType(I32, N)) if x.element is F32 else bits


def _value(lanes: Lanes, x: Array, bits: Value) -> Value:
    """Return the float32 value of one weight's raw bits."""
    if x.element is F32:
        return lanes.b.bitcast(bits, F32)
    one = lanes.splat(bits, 1)
    values = lanes.from_bf16(one) if x.holds == types.uint16 else lanes.from_f16(one)
    return lanes.b.extract_element(values, ir.Constant(I32, 0))


def _first_sign(lanes: Lanes, bits: Value, among: Value) -> Value:
    """Whether the first of the lanes in the mask `among` is negative. As an int32, p & -p is a mask's lowest bit."""
    zero, one = ir.Constant(I32, 0), ir.Constant(I32, 1)
    places = lanes.b.bitcast(among, I32)
    first = lanes.b.and_(places, lanes.b.sub(zero, places))
    negative = lanes.b.bitcast(lanes.b.icmp_signed("<", bits, lanes.const(bits.type, 0)), I32)
    return lanes.b.icmp_unsigned(">=", lanes.b.and_(first, negative), one)


@vector(types.float32)
def largest(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the largest magnitude of a block."""
    bits = _bits(lanes, x, at)
    mask = 0x7FFFFFFF if x.element is F32 else 0x7FFF
    return _value(lanes, x, lanes.reduce("umax", lanes.op("and_", bits, mask)))


@vector(types.float32)
def _extreme(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the weight of greatest magnitude with its sign, as C's loop `if (amax < fabsf(v))` finds it.

    Of equal magnitudes the first counts, and a block of zeros gives +0.
    """
    bits = _bits(lanes, x, at)
    kind, is_wide = bits.type.element, x.element is F32
    magnitudes = lanes.op("and_", bits, 0x7FFFFFFF if is_wide else 0x7FFF)
    top = lanes.reduce("umax", magnitudes)
    among = lanes.b.icmp_unsigned("==", magnitudes, lanes.splat(top, N))
    minus = lanes.b.and_(_first_sign(lanes, bits, among), lanes.b.icmp_unsigned("!=", top, ir.Constant(kind, 0)))
    sign = ir.Constant(kind, 1 << (31 if is_wide else 15))
    return _value(lanes, x, lanes.b.or_(top, lanes.b.select(minus, sign, ir.Constant(kind, 0))))


def _sortable(lanes: Lanes, bits: Value, is_wide: bool) -> Value:
    """Map float bits to integers that sort as the floats do, -0 just below +0. The map is its own inverse."""
    shift, mask = (31, 0x7FFFFFFF) if is_wide else (15, 0x7FFF)
    return lanes.b.xor(bits, lanes.op("and_", lanes.op("ashr", bits, shift), mask))


@vector(types.float32)
def _highest(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the greatest weight of a block."""
    is_wide = x.element is F32
    top = lanes.reduce("smax", _sortable(lanes, _bits(lanes, x, at), is_wide))
    one = _sortable(lanes, lanes.splat(top, 1), is_wide)
    return _value(lanes, x, lanes.b.extract_element(one, ir.Constant(I32, 0)))


@vector(types.float32)
def _lowest(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the least weight of a block, as C's loop `if (v < min)` finds it.

    If that is zero it has the sign of the block's first zero, which is stored in float16 as the block's minimum.
    """
    bits = _bits(lanes, x, at)
    kind, is_wide = bits.type.element, x.element is F32
    low = lanes.reduce("smin", _sortable(lanes, bits, is_wide))
    one = _sortable(lanes, lanes.splat(low, 1), is_wide)
    found = lanes.b.extract_element(one, ir.Constant(I32, 0))
    mask = 0x7FFFFFFF if is_wide else 0x7FFF
    among = lanes.b.icmp_unsigned("==", lanes.op("and_", bits, mask), lanes.const(bits.type, 0))
    sign = ir.Constant(kind, 1 << (31 if is_wide else 15))
    zero = lanes.b.select(_first_sign(lanes, bits, among), sign, ir.Constant(kind, 0))
    is_zero = lanes.b.icmp_unsigned("==", lanes.b.and_(found, ir.Constant(kind, mask)), ir.Constant(kind, 0))
    return _value(lanes, x, lanes.b.select(is_zero, zero, found))


@vector(types.void)
def _scales(
    lanes: Lanes, spans: Array, divisor: Value, offset: Value, inverses: Array, offsets: Array, halves: Array
) -> Value:
    """Compute BATCH blocks' scales d = span / divisor: float16 bits into `halves`, 1 / d into `inverses`.

    The inverse of 0 is 0, as in ggml. `offsets` receives what is added before codes are cut: `offset`, or 0 with an
    inverse of 0 where 1 / d is infinite, so that all codes are 0.
    """
    at, kind = ir.Constant(ir.IntType(64), 0), ir.VectorType(F32, BATCH)
    zero, one = lanes.const(kind, 0), lanes.const(kind, 1)
    d = lanes.b.fdiv(lanes.load(spans, at, BATCH), lanes.splat(divisor, BATCH))
    inverse = lanes.b.select(lanes.b.fcmp_unordered("!=", d, zero), lanes.b.fdiv(one, d), zero)
    endless = lanes.b.fcmp_ordered("==", lanes.absolute(inverse), lanes.const(kind, math.inf))
    lanes.store(lanes.b.select(endless, zero, inverse), inverses, at)
    lanes.store(lanes.b.select(endless, zero, lanes.splat(offset, BATCH)), offsets, at)
    lanes.store(lanes.b.bitcast(lanes.to_f16(d), ir.VectorType(I16, BATCH)), halves, at)


@vector(types.void)
def _halves(lanes: Lanes, values: Array, halves: Array) -> Value:
    """Round BATCH float32s to float16 bits."""
    at = ir.Constant(ir.IntType(64), 0)
    lanes.store(lanes.to_f16(lanes.load(values, at, BATCH)), halves, at)


def put(lanes: Lanes, value: Value, out: Array, at: Value, offset: int) -> None:
    """Store a scalar or a vector at byte `at` + `offset`."""
    lanes.b.store(value, out.pointer(lanes.op("add", at, offset), value.type), align=1)


@vector(types.void)
def _write_q8_0(lanes: Lanes, x: Array, at: Value, inverse: Value, half: Value, out: Array, to: Value) -> None:
    """Write the block of Q8_0 of weights from `at` on to byte `to`: codes are roundf(x * inverse)."""
    codes, wide = [], ir.VectorType(I32, N // 2)
    for values in lanes.pairs(x, at, N):
        v = lanes.b.fmul(values, lanes.splat(inverse, N // 2))
        nudge = lanes.op("or_", lanes.op("and_", lanes.b.bitcast(v, wide), -0x80000000), ROUND_AWAY)
        codes.append(lanes.b.fptosi(lanes.b.fadd(v, lanes.b.bitcast(nudge, v.type)), wide))
    put(lanes, half, out, to, 0)
    rounding.store_byte_pairs(lanes, codes[0], codes[1], out, lanes.op("add", to, 2))


def _codes(
    lanes: Lanes, x: Array, at: Value, low: Value | None, inverse: Value, offset: Value, top: int
) -> list[Value]:
    """Return the codes of a block's two halves, as int16: min(top, int((x - low) * inverse + offset))."""
    found, count = [], N // 4
    for half in range(2):
        pair = []
        for v in lanes.pairs(x, lanes.op("add", at, half * N // 2), N // 2):
            v = v if low is None else lanes.b.fsub(v, lanes.splat(low, count))
            v = lanes.b.fadd(lanes.b.fmul(v, lanes.splat(inverse, count)), lanes.splat(offset, count))
            pair.append(lanes.b.fptosi(v, ir.VectorType(I32, count)))
        codes = lanes.woven(*pair)
        limit = lanes.const(codes.type, top)
        found.append(lanes.b.select(lanes.b.icmp_signed("<", codes, limit), codes, limit))
    return found


def put_nibbles(lanes: Lanes, codes: list[Value], out: Array, to: Value, offset: int) -> None:
    """Store the low four bits of a block's codes: the first half in low nibbles, the second in high ones."""
    low, high = (lanes.op("and_", half, 15) for half in codes)
    both = lanes.b.or_(low, lanes.op("shl", high, 4))
    put(lanes, lanes.b.trunc(both, ir.VectorType(I8, N // 2)), out, to, offset)


def _fifth_bits(lanes: Lanes, codes: list[Value], out: Array, to: Value, offset: int) -> None:
    """Store the fifth bits of a block's 32 codes as one uint32. A mask of 32 lanes is that number already."""
    whole = lanes.join(codes)
    is_set = lanes.b.icmp_unsigned("!=", lanes.op("and_", whole, 16), lanes.const(whole.type, 0))
    put(lanes, lanes.b.bitcast(is_set, I32), out, to, offset)


@vector(types.void)
def _write_q4_0(
    lanes: Lanes, x: Array, at: Value, inverse: Value, offset: Value, half: Value, out: Array, to: Value
) -> None:
    put(lanes, half, out, to, 0)
    put_nibbles(lanes, _codes(lanes, x, at, None, inverse, offset, 15), out, to, 2)


@vector(types.void)
def _write_q5_0(
    lanes: Lanes, x: Array, at: Value, inverse: Value, offset: Value, half: Value, out: Array, to: Value
) -> None:
    codes = _codes(lanes, x, at, None, inverse, offset, 31)
    put(lanes, half, out, to, 0)
    _fifth_bits(lanes, codes, out, to, 2)
    put_nibbles(lanes, codes, out, to, 6)


@vector(types.void)
def _write_q4_1(
    lanes: Lanes,
    x: Array,
    at: Value,
    low: Value,
    inverse: Value,
    offset: Value,
    half: Value,
    low_half: Value,
    out: Array,
    to: Value,
) -> None:
    put(lanes, half, out, to, 0)
    put(lanes, low_half, out, to, 2)
    put_nibbles(lanes, _codes(lanes, x, at, low, inverse, offset, 15), out, to, 4)


@vector(types.void)
def _write_q5_1(
    lanes: Lanes,
    x: Array,
    at: Value,
    low: Value,
    inverse: Value,
    offset: Value,
    half: Value,
    low_half: Value,
    out: Array,
    to: Value,
) -> None:
    codes = _codes(lanes, x, at, low, inverse, offset, 31)
    put(lanes, half, out, to, 0)
    put(lanes, low_half, out, to, 2)
    _fifth_bits(lanes, codes, out, to, 4)
    put_nibbles(lanes, codes, out, to, 8)


@kernel
def encode_q8_0(x, out):  # type: ignore[no-untyped-def]
    """Encode Q8_0. x: (n,), n a multiple of 32; out: uint8 (n / 32 * 34,)."""
    spans, inverses, offsets = np.zeros(BATCH, np.float32), np.empty(BATCH, np.float32), np.empty(BATCH, np.float32)
    halves = np.empty(BATCH, np.uint16)
    for first in range(0, x.size // N, BATCH):
        count = min(BATCH, x.size // N - first)
        for k in range(count):
            spans[k] = largest(x, (first + k) * N)
        _scales(spans, np.float32(127), np.float32(0), inverses, offsets, halves)
        for k in range(count):
            _write_q8_0(x, (first + k) * N, inverses[k], halves[k], out, (first + k) * 34)


@kernel
def encode_q4_0(x, out):  # type: ignore[no-untyped-def]
    """Encode Q4_0. x: (n,), n a multiple of 32; out: uint8 (n / 32 * 18,)."""
    spans, inverses, offsets = np.zeros(BATCH, np.float32), np.empty(BATCH, np.float32), np.empty(BATCH, np.float32)
    halves = np.empty(BATCH, np.uint16)
    for first in range(0, x.size // N, BATCH):
        count = min(BATCH, x.size // N - first)
        for k in range(count):
            spans[k] = _extreme(x, (first + k) * N)
        _scales(spans, np.float32(-8), np.float32(8.5), inverses, offsets, halves)
        for k in range(count):
            _write_q4_0(x, (first + k) * N, inverses[k], offsets[k], halves[k], out, (first + k) * 18)


@kernel
def encode_q5_0(x, out):  # type: ignore[no-untyped-def]
    """Encode Q5_0. x: (n,), n a multiple of 32; out: uint8 (n / 32 * 22,)."""
    spans, inverses, offsets = np.zeros(BATCH, np.float32), np.empty(BATCH, np.float32), np.empty(BATCH, np.float32)
    halves = np.empty(BATCH, np.uint16)
    for first in range(0, x.size // N, BATCH):
        count = min(BATCH, x.size // N - first)
        for k in range(count):
            spans[k] = _extreme(x, (first + k) * N)
        _scales(spans, np.float32(-16), np.float32(16.5), inverses, offsets, halves)
        for k in range(count):
            _write_q5_0(x, (first + k) * N, inverses[k], offsets[k], halves[k], out, (first + k) * 22)


@kernel
def _encode_offset(x, is_five, out):  # type: ignore[no-untyped-def]
    """Encode Q4_1, or Q5_1 with `is_five`."""
    spans, inverses, offsets = np.zeros(BATCH, np.float32), np.empty(BATCH, np.float32), np.empty(BATCH, np.float32)
    lows, halves, low_halves = np.zeros(BATCH, np.float32), np.empty(BATCH, np.uint16), np.empty(BATCH, np.uint16)
    divisor, size = (np.float32(31), 24) if is_five else (np.float32(15), 20)
    for first in range(0, x.size // N, BATCH):
        count = min(BATCH, x.size // N - first)
        for k in range(count):
            lows[k] = _lowest(x, (first + k) * N)
            spans[k] = np.float32(_highest(x, (first + k) * N) - lows[k])
        _scales(spans, divisor, np.float32(0.5), inverses, offsets, halves)
        _halves(lows, low_halves)
        for k in range(count):
            at, to = (first + k) * N, (first + k) * size
            if is_five:
                _write_q5_1(x, at, lows[k], inverses[k], offsets[k], halves[k], low_halves[k], out, to)
            else:
                _write_q4_1(x, at, lows[k], inverses[k], offsets[k], halves[k], low_halves[k], out, to)


def encode_q4_1(x: np.ndarray, out: np.ndarray) -> None:
    """Encode Q4_1. x: (n,), n a multiple of 32; out: uint8 (n / 32 * 20,)."""
    _encode_offset(x, False, out)


def encode_q5_1(x: np.ndarray, out: np.ndarray) -> None:
    """Encode Q5_1. x: (n,), n a multiple of 32; out: uint8 (n / 32 * 24,)."""
    _encode_offset(x, True, out)
