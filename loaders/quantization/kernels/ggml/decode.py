"""Decoders of ggml's block formats to float32, as llama.cpp's dequantize_row_* (ggml/src/ggml-quants.c) compute them.

They share no code with the encoders, which they check. data: uint8, whole blocks; out: float32, their weights. What the
bytes of a block mean is described in kernels/ggml/blocks.py, mxfp4.py, k_quants.py and ternary.py.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.intrinsics import half_value
from loaders.quantization.kernels.lanes import F32, I16, I32, Array, Lanes, Value, kernel, vector


@kernel
def half_at(data, at):  # type: ignore[no-untyped-def]
    """Return the float16 at byte `at`, little-endian, as float32."""
    return half_value(np.uint16(np.uint16(data[at]) | np.uint16(np.uint16(data[at + 1]) << np.uint16(8))))


def _load_bytes(lanes: Lanes, data: Array, at: Value, offset: int, count: int) -> Value:
    """Load `count` bytes from byte `at` + `offset` on."""
    return lanes.load(data, lanes.op("add", at, offset), count)


def _integers(lanes: Lanes, raw: Value) -> Value:
    """Widen unsigned bytes to int32 lanes."""
    return lanes.b.zext(raw, ir.VectorType(I32, raw.type.count))


def _half(lanes: Lanes, data: Array, at: Value, offset: int) -> Value:
    """Return sixteen lanes of the float16 at byte `at` + `offset`, as float32.

    A float16 converted alone would wait for the one before: it is put into a register that holds that one's result.
    """
    bits = lanes.b.bitcast(_load_bytes(lanes, data, at, offset, 2), I16)
    return lanes.from_f16(lanes.splat(bits, 16))


def _put(lanes: Lanes, values: list[Value], out: Array, to: Value) -> None:
    """Store vectors of sixteen weights one after another, from weight `to` on."""
    for index, each in enumerate(values):
        lanes.store(each, out, lanes.op("add", to, 16 * index))


def _scaled(lanes: Lanes, codes: Value, scale: Value) -> Value:
    """Return code * scale for sixteen int32 codes."""
    return lanes.b.fmul(lanes.b.sitofp(codes, scale.type), scale)


def _nibbles(lanes: Lanes, data: Array, at: Value, offset: int) -> tuple[Value, Value]:
    """Return the 16 low nibbles and the 16 high ones of 16 bytes: the first and the second half of a block."""
    codes = _integers(lanes, _load_bytes(lanes, data, at, offset, 16))
    return lanes.op("and_", codes, 15), lanes.op("lshr", codes, 4)


def _with_fifth(lanes: Lanes, data: Array, at: Value, offset: int, halves: tuple[Value, Value]) -> list[Value]:
    """Add the fifth bits to the nibbles of a block's halves: bit i of the uint32 at `offset` belongs to weight i."""
    raw = _load_bytes(lanes, data, at, offset, 4)
    word = lanes.splat(lanes.b.bitcast(raw, I32), 16)
    found = []
    for part, low in enumerate(halves):
        bits = lanes.b.lshr(word, lanes.const(word.type, range(16 * part, 16 * part + 16)))
        found.append(lanes.b.or_(low, lanes.op("shl", lanes.op("and_", bits, 1), 4)))
    return found


# The weights of a block by the byte `at` which it begins, sixteen to a vector.


def eight(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q8_0."""
    scale, kind = _half(lanes, data, at, 0), ir.VectorType(I32, 16)
    halves = (_load_bytes(lanes, data, at, 2 + 16 * part, 16) for part in range(2))
    return [_scaled(lanes, lanes.b.sext(raw, kind), scale) for raw in halves]


def four_centred(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q4_0."""
    scale = _half(lanes, data, at, 0)
    return [_scaled(lanes, lanes.op("sub", codes, 8), scale) for codes in _nibbles(lanes, data, at, 2)]


def four_offset(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q4_1."""
    scale, low = _half(lanes, data, at, 0), _half(lanes, data, at, 2)
    return [lanes.b.fadd(_scaled(lanes, codes, scale), low) for codes in _nibbles(lanes, data, at, 4)]


def five_centred(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q5_0."""
    scale, codes = _half(lanes, data, at, 0), _with_fifth(lanes, data, at, 2, _nibbles(lanes, data, at, 6))
    return [_scaled(lanes, lanes.op("sub", each, 16), scale) for each in codes]


def five_offset(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q5_1."""
    scale, low = _half(lanes, data, at, 0), _half(lanes, data, at, 2)
    codes = _with_fifth(lanes, data, at, 4, _nibbles(lanes, data, at, 8))
    return [lanes.b.fadd(_scaled(lanes, each, scale), low) for each in codes]


@vector(types.void)
def _eight(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    _put(lanes, eight(lanes, data, at), out, to)


@vector(types.void)
def _four_centred(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    _put(lanes, four_centred(lanes, data, at), out, to)


@vector(types.void)
def _four_offset(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    _put(lanes, four_offset(lanes, data, at), out, to)


@vector(types.void)
def _five_centred(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    _put(lanes, five_centred(lanes, data, at), out, to)


@vector(types.void)
def _five_offset(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    _put(lanes, five_offset(lanes, data, at), out, to)


@kernel
def q8_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _eight(data, b * 34, out, b * 32)


@kernel
def q4_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _four_centred(data, b * 18, out, b * 32)


@kernel
def q4_1(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _four_offset(data, b * 20, out, b * 32)


@kernel
def q5_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _five_centred(data, b * 22, out, b * 32)


@kernel
def q5_1(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _five_offset(data, b * 24, out, b * 32)


E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled, as in ggml


def scale_of_mxfp4(lanes: Lanes, data: Array, at: Value) -> Value:
    """Return sixteen lanes of a block's scale, which is halved as codes are doubled: 2^(byte - 128).

    Below 2^-126 that is a subnormal float32.
    """
    byte = lanes.b.zext(lanes.b.load(data.pointer(at, data.element), align=1), I32)
    normal = lanes.op("shl", lanes.op("sub", byte, 1), 23)
    small = lanes.b.shl(ir.Constant(I32, 0x200000), lanes.op("and_", byte, 1))
    is_normal = lanes.b.icmp_signed(">", byte, ir.Constant(I32, 1))
    return lanes.splat(lanes.b.bitcast(lanes.b.select(is_normal, normal, small), F32), 16)


def four_floating(lanes: Lanes, data: Array, at: Value, scale: Value) -> list[Value]:
    """Return the 32 weights of a block of MXFP4 of a known scale."""
    return [lanes.b.fmul(lanes.lookup(E2M1, codes), scale) for codes in _nibbles(lanes, data, at, 1)]


@vector(types.void)
def _four_floating(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    _put(lanes, four_floating(lanes, data, at, scale_of_mxfp4(lanes, data, at)), out, to)


@kernel
def mxfp4(data, out):  # type: ignore[no-untyped-def]
    """Decode MXFP4 by doubled codes and halved scales, as ggml. An exponent byte of 255 is 2^128 there, and not NaN."""
    for b in range(out.size // 32):
        _four_floating(data, b * 17, out, b * 32)


def _field(lanes: Lanes, data: Array, at: Value, shift: Value, mask: int) -> Value:
    """Return some bits, from bit `shift` on, of each of sixteen bytes, as int32 lanes."""
    raw = _integers(lanes, lanes.load(data, at, 16))
    return lanes.op("and_", lanes.b.lshr(raw, lanes.splat(lanes.b.trunc(shift, I32), 16)), mask)


def _put_group(lanes: Lanes, codes: Value, scale: Value, low: Value | None, out: Array, to: Value) -> None:
    """Store code * scale (- low) for sixteen int32 codes, from weight `to` on."""
    values = lanes.b.fmul(lanes.b.sitofp(codes, ir.VectorType(F32, 16)), lanes.splat(scale, 16))
    lanes.store(values if low is None else lanes.b.fsub(values, lanes.splat(low, 16)), out, to)


@vector(types.void)
def _two(lanes: Lanes, data: Array, at: Value, shift: Value, scale: Value, low: Value, out: Array, to: Value) -> None:
    """Decode a sub-block of Q2_K, whose two bits of each code begin at bit `shift` of bytes from `at` on."""
    _put_group(lanes, _field(lanes, data, at, shift, 3), scale, low, out, to)


@vector(types.void)
def _three(
    lanes: Lanes, data: Array, at: Value, shift: Value, high: Value, bit: Value, scale: Value, out: Array, to: Value
) -> None:
    """Decode a sub-block of Q3_K: as `_two`, and a third bit of each code at `bit` of bytes from `high` on."""
    top = lanes.op("shl", _field(lanes, data, high, bit, 1), 2)
    codes = lanes.op("sub", lanes.b.or_(_field(lanes, data, at, shift, 3), top), 4)
    _put_group(lanes, codes, scale, None, out, to)


@vector(types.void)
def _six(
    lanes: Lanes, data: Array, at: Value, shift: Value, high: Value, place: Value, scale: Value, out: Array, to: Value
) -> None:
    """Decode a sub-block of Q6_K: four low bits of each code from `at` on, two high ones from `high` on."""
    top = lanes.op("shl", _field(lanes, data, high, place, 3), 4)
    codes = lanes.op("sub", lanes.b.or_(_field(lanes, data, at, shift, 15), top), 32)
    _put_group(lanes, codes, scale, None, out, to)


@kernel
def q2_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        at, to = b * 84, b * 256
        d, dmin = half_at(data, at + 80), half_at(data, at + 82)
        for j in range(16):
            both = data[at + j]
            scale, low = d * np.float32(both & 15), dmin * np.float32(both >> 4)
            start = at + 16 + (j // 8) * 32 + (j % 2) * 16
            _two(data, start, 2 * (j // 2 % 4), scale, low, out, to + 16 * j)


@kernel
def q3_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        at, to = b * 110, b * 256
        d = half_at(data, at + 108)
        for j in range(16):
            nibble = (data[at + 96 + j % 8] >> np.uint8(4 * (j // 8))) & np.uint8(15)
            top = (data[at + 104 + j % 4] >> np.uint8(2 * (j // 4))) & np.uint8(3)
            scale = d * np.float32(np.int32(nibble) + 16 * np.int32(top) - 32)
            start = at + 32 + (j // 8) * 32 + (j % 2) * 16
            _three(data, start, 2 * (j // 2 % 4), at + (j % 2) * 16, j // 2, scale, out, to + 16 * j)


@kernel
def six_bits(data, at, j):  # type: ignore[no-untyped-def]
    """Return the scale and the minimum of sub-block j from the twelve bytes at `at`: ggml's get_scale_min_k4."""
    if j < 4:
        return np.int32(data[at + j] & 63), np.int32(data[at + 4 + j] & 63)
    scale = (data[at + 4 + j] & 15) | ((data[at + j - 4] >> 6) << 4)
    low = (data[at + 4 + j] >> 4) | ((data[at + j] >> 6) << 4)
    return np.int32(scale), np.int32(low)


@vector(types.void)
def _line(
    lanes: Lanes,
    data: Array,
    at: Value,
    shift: Value,
    fifths: Value,
    bit: Value,
    scale: Value,
    low: Value,
    out: Array,
    to: Value,
) -> None:
    """Decode 32 weights of Q4_K or Q5_K: scale * (nibble + 16 * fifth bit) - low.

    A fifth bit is bit `bit` of a byte at `fifths`; for Q4_K, which has none, `bit` is 8.
    """
    for part in range(2):
        raw = _integers(lanes, _load_bytes(lanes, data, at, 16 * part, 16))
        codes = lanes.op("and_", lanes.b.lshr(raw, lanes.splat(shift, 16)), 15)
        high = _integers(lanes, _load_bytes(lanes, data, fifths, 16 * part, 16))
        high = lanes.op("and_", lanes.b.lshr(high, lanes.splat(bit, 16)), 1)
        codes = lanes.b.or_(codes, lanes.op("shl", high, 4))
        values = lanes.b.fmul(lanes.b.sitofp(codes, ir.VectorType(F32, 16)), lanes.splat(scale, 16))
        lanes.store(lanes.b.fsub(values, lanes.splat(low, 16)), out, lanes.op("add", to, 16 * part))


@kernel
def q4_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        at = b * 144
        d, dmin = half_at(data, at), half_at(data, at + 2)
        for j in range(8):
            s, m = six_bits(data, at + 4, j)
            scale, low = d * np.float32(s), dmin * np.float32(m)
            start = at + 16 + 32 * (j // 2)
            _line(data, start, np.int32(4 * (j % 2)), start, np.int32(8), scale, low, out, b * 256 + 32 * j)


@kernel
def q5_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        at = b * 176
        d, dmin = half_at(data, at), half_at(data, at + 2)
        for j in range(8):
            s, m = six_bits(data, at + 4, j)
            scale, low = d * np.float32(s), dmin * np.float32(m)
            start = at + 48 + 32 * (j // 2)
            _line(data, start, np.int32(4 * (j % 2)), at + 16, np.int32(j), scale, low, out, b * 256 + 32 * j)


@kernel
def q6_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        at, to = b * 210, b * 256
        d = half_at(data, at + 208)
        for j in range(16):
            scale = d * np.float32(np.int8(data[at + 192 + j]))
            half, place = j // 8, j % 8  # of 128 weights: places 0 to 3 are low nibbles, 4 to 7 high ones
            low = at + 64 * half + 16 * (place % 4)
            high = at + 128 + 32 * half + 16 * (place % 2)
            _six(data, low, 4 * (place // 4), high, 2 * (place // 2), scale, out, to + 16 * j)


@kernel
def tq1_0(data, out):  # type: ignore[no-untyped-def]
    """Decode TQ1_0: multiplying a byte, a fraction of 256, by 3 carries its next trit out of the low eight bits."""
    for b in range(out.size // 256):
        at, to = b * 54, b * 256
        d = half_at(data, at + 52)
        for i in range(52):
            first, step = (i, 32) if i < 32 else (160 + i - 32, 16) if i < 48 else (240 + i - 48, 4)
            fraction = np.uint32(data[at + i])
            for n in range(5 if i < 48 else 4):
                trit = (fraction * np.uint32(3)) >> np.uint32(8)
                out[to + first + n * step] = np.float32(np.int32(trit) - 1) * d
                fraction = (fraction * np.uint32(3)) & np.uint32(255)


def four_trits(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 256 weights of a block of TQ2_0: the four codes of a byte belong to weights 32 apart."""
    scale, found = _half(lanes, data, at, 64), []
    for half in range(2):
        parts = [_integers(lanes, _load_bytes(lanes, data, at, 32 * half + 16 * part, 16)) for part in range(2)]
        for n in range(4):
            codes = (lanes.op("and_", lanes.op("lshr", raw, 2 * n), 3) for raw in parts)
            found += [_scaled(lanes, lanes.op("sub", each, 1), scale) for each in codes]
    return found


@vector(types.void)
def _four_trits(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    _put(lanes, four_trits(lanes, data, at), out, to)


@kernel
def tq2_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        _four_trits(data, b * 66, out, b * 256)


DECODERS = {
    "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "MXFP4": mxfp4, "Q2_K": q2_k, "Q3_K": q3_k,
    "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "TQ1_0": tq1_0, "TQ2_0": tq2_0,
}  # fmt: skip
