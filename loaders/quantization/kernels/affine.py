"""MLX's affine codes: groups of weights between a least and a greatest value, `bits` bits each.

The arithmetic is that of mlx.core.quantize 0.32 on a CPU, in float32, bit by bit. Of a group, with n = 2^bits - 1:
    scale = max((greatest - least) / n, 1e-7), negated unless |least| > |greatest|
    edge  = the end of greater magnitude; q = rint(edge / scale)
    where q is not 0: scale = edge / q, bias = edge; else bias = 0
    code  = clip(rint((w - bias) / scale), 0, n), by scale and bias before they are rounded to the weights' dtype
Codes are a stream of bits, the first in the lowest: a byte holds two of four bits, three bytes hold eight of three. A
NaN is passed over by least and greatest and gets code 0 (in MLX its code is whatever the CPU makes of it).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F32, I8, I16, I32, Array, Lanes, Value, kernel, vector

STEP = 32  # weights coded at once
LANES = 16
SMALLEST_SCALE = 1e-7
TO_INTEGER = (
    2.0**23
)  # added to a float32 from 0 to 2^22, it leaves the nearest integer, halves to even, in the low bits
I64 = ir.IntType(64)


# --- encoding


def _halved(lanes: Lanes, low: Value, high: Value) -> tuple[Value, Value]:
    """The lesser and the greater of the first and second half of the lanes, down to one lane."""
    while (width := low.type.count // 2) > 0:
        low = _lesser(lanes, lanes.part(low, 0, width), lanes.part(low, 1, width))
        high = lanes.larger(lanes.part(high, 0, width), lanes.part(high, 1, width))
    zero = ir.Constant(I32, 0)
    return lanes.b.extract_element(low, zero), lanes.b.extract_element(high, zero)


def _lesser(lanes: Lanes, a: Value, b: Value) -> Value:
    """C's `a < b ? a : b`: a NaN in `a` leaves `b`."""
    return lanes.b.select(lanes.b.fcmp_ordered("<", a, b), a, b)


def _range_of(group: int) -> Any:
    @vector(types.void)
    def group_range(lanes: Lanes, x: Array, at: Value, lows: Array, highs: Array, slot: Value) -> None:
        """The least and the greatest weight of a group into entry `slot`."""
        kind = ir.VectorType(F32, LANES)
        low, high = lanes.const(kind, float("inf")), lanes.const(kind, float("-inf"))
        for part in range(group // LANES):
            values = lanes.floats(x, lanes.op("add", at, LANES * part), LANES)
            low, high = _lesser(lanes, values, low), lanes.larger(values, high)
        for array, value in zip((lows, highs), _halved(lanes, low, high), strict=True):
            lanes.b.store(value, lanes.b.gep(array.data, [slot]))

    return group_range


_range_32, _range_64, _range_128 = (_range_of(group) for group in (32, 64, 128))


def _rint(lanes: Lanes, value: Value) -> Value:
    """To the nearest integer, halves to even; without the instruction, which a plain CPU lacks."""
    size = lanes.absolute(value)
    whole = lanes.op("fsub", lanes.op("fadd", size, TO_INTEGER), TO_INTEGER)
    whole = lanes.b.select(lanes.b.fcmp_ordered("<", size, lanes.const(size.type, TO_INTEGER)), whole, size)
    is_negative = lanes.b.fcmp_ordered("<", value, lanes.const(size.type, 0))
    return lanes.b.select(is_negative, lanes.b.fneg(whole), whole)


@vector(types.void)
def _scales(lanes: Lanes, lows: Array, highs: Array, top: Value, scales: Array, biases: Array) -> None:
    """Scales and biases of LANES groups from their least and greatest weights; `top` is 2^bits - 1."""
    start, zero = ir.Constant(I64, 0), lanes.const(ir.VectorType(F32, LANES), 0)
    low, high = lanes.load(lows, start, LANES), lanes.load(highs, start, LANES)
    is_low = lanes.b.fcmp_ordered(">", lanes.absolute(low), lanes.absolute(high))
    scale = lanes.b.fdiv(lanes.b.fsub(high, low), lanes.splat(top, LANES))
    scale = lanes.larger(scale, lanes.const(scale.type, np.float32(SMALLEST_SCALE)))
    scale = lanes.b.select(is_low, scale, lanes.b.fneg(scale))
    edge = lanes.b.select(is_low, low, high)
    steps = _rint(lanes, lanes.b.fdiv(edge, scale))
    has_steps = lanes.b.fcmp_unordered("!=", steps, zero)
    lanes.store(lanes.b.select(has_steps, lanes.b.fdiv(edge, steps), scale), scales, start)
    lanes.store(lanes.b.select(has_steps, edge, zero), biases, start)


def packed_bits(lanes: Lanes, codes: Value, bits: int) -> Value:
    """Codes (int8, a multiple of eight) as a stream of bits: int8, `bits` for every eight codes."""
    count = codes.type.count
    for width, narrow, wide in ((bits, I8, I16), (2 * bits, I16, I32), (4 * bits, I32, I64)):
        pairs = lanes.b.bitcast(codes, ir.VectorType(wide, codes.type.count // 2))
        first = lanes.op("and_", pairs, (1 << narrow.width) - 1)
        codes = lanes.b.or_(first, lanes.op("shl", lanes.op("lshr", pairs, narrow.width), width))
    whole = lanes.b.bitcast(codes, ir.VectorType(I8, count))
    return lanes.shuffle(whole, [8 * eight + byte for eight in range(count // 8) for byte in range(bits)])


def _coder_of(bits: int) -> Any:
    @vector(types.void)
    def code(lanes: Lanes, x: Array, at: Value, scale: Value, bias: Value, packed: Array) -> None:
        """STEP weights from `at` into their place among the packed bytes."""
        divisor, start = lanes.splat(scale, LANES), lanes.splat(bias, LANES)
        parts = []
        for part in range(STEP // LANES):
            values = lanes.floats(x, lanes.op("add", at, LANES * part), LANES)
            steps = lanes.b.fdiv(lanes.b.fsub(values, start), divisor)
            steps = lanes.larger(steps, lanes.const(steps.type, 0))
            steps = _lesser(lanes, steps, lanes.const(steps.type, (1 << bits) - 1))
            whole = lanes.b.bitcast(lanes.op("fadd", steps, TO_INTEGER), ir.VectorType(I32, LANES))
            parts.append(lanes.b.trunc(whole, ir.VectorType(I8, LANES)))
        codes = lanes.join(parts)
        place = lanes.op("mul", lanes.op("lshr", at, 3), bits)
        lanes.store(codes if bits == 8 else packed_bits(lanes, codes, bits), packed, place)

    return code


_code_2, _code_3, _code_4, _code_5, _code_6, _code_8 = (_coder_of(bits) for bits in (2, 3, 4, 5, 6, 8))


@kernel
def _code_group(x, start, stop, bits, scale, bias, packed):  # type: ignore[no-untyped-def]
    for at in range(start, stop, STEP):
        if bits == 4:
            _code_4(x, at, scale, bias, packed)
        elif bits == 8:
            _code_8(x, at, scale, bias, packed)
        elif bits == 2:
            _code_2(x, at, scale, bias, packed)
        elif bits == 3:
            _code_3(x, at, scale, bias, packed)
        elif bits == 5:
            _code_5(x, at, scale, bias, packed)
        else:
            _code_6(x, at, scale, bias, packed)


@kernel
def encode(x, bits, group, packed, scales, biases):  # type: ignore[no-untyped-def]
    """Code whole groups. x: (n,) raw weights, n = len(scales) * group, group 32, 64 or 128; bits 2 to 6, or 8.

    packed: uint8 (n * bits / 8,); scales, biases: float32, as they are before they take the weights' dtype.
    """
    lows, highs = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    some_scales, some_biases = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    top = np.float32((1 << bits) - 1)
    for first in range(0, scales.size, LANES):
        count = min(LANES, scales.size - first)
        for slot in range(count):
            if group == 64:
                _range_64(x, (first + slot) * group, lows, highs, slot)
            elif group == 32:
                _range_32(x, (first + slot) * group, lows, highs, slot)
            else:
                _range_128(x, (first + slot) * group, lows, highs, slot)
        _scales(lows, highs, top, some_scales, some_biases)
        for slot in range(count):
            start = (first + slot) * group
            _code_group(x, start, start + group, bits, some_scales[slot], some_biases[slot], packed)
            scales[first + slot] = some_scales[slot]
            biases[first + slot] = some_biases[slot]


# --- decoding


def _decoder_of(bits: int) -> Any:
    @vector(types.void)
    def decode_step(lanes: Lanes, packed: Array, at: Value, scale: Value, bias: Value, out: Array) -> None:
        """STEP weights from `at` out of their place among the packed bytes."""
        raw = lanes.load(packed, lanes.op("mul", lanes.op("lshr", at, 3), bits), STEP // 8 * bits)
        for part in range(STEP // LANES):
            kind = ir.VectorType(I32, LANES)
            firsts = [(LANES * part + lane) * bits // 8 for lane in range(LANES)]
            lasts = [min(first + 1, STEP // 8 * bits - 1) for first in firsts]
            low, high = (lanes.b.zext(lanes.shuffle(raw, bytes_), kind) for bytes_ in (firsts, lasts))
            both = lanes.b.or_(low, lanes.op("shl", high, 8)) if 8 % bits else low
            shifts = lanes.const(kind, [(LANES * part + lane) * bits % 8 for lane in range(LANES)])
            codes = lanes.op("and_", lanes.b.lshr(both, shifts), (1 << bits) - 1)
            steps = lanes.b.sitofp(codes, ir.VectorType(F32, LANES))
            values = lanes.b.fadd(lanes.b.fmul(steps, lanes.splat(scale, LANES)), lanes.splat(bias, LANES))
            lanes.store(values, out, lanes.op("add", at, LANES * part))

    return decode_step


_decode_2, _decode_3, _decode_4, _decode_5, _decode_6, _decode_8 = (_decoder_of(bits) for bits in (2, 3, 4, 5, 6, 8))


@kernel
def decode(packed, scales, biases, bits, group, out):  # type: ignore[no-untyped-def]
    """Whole groups, code * scale + bias. packed: uint8 (n * bits / 8,); scales, biases: float32; out: float32 (n,)."""
    for g in range(scales.size):
        scale, bias = scales[g], biases[g]
        for at in range(g * group, (g + 1) * group, STEP):
            if bits == 4:
                _decode_4(packed, at, scale, bias, out)
            elif bits == 8:
                _decode_8(packed, at, scale, bias, out)
            elif bits == 2:
                _decode_2(packed, at, scale, bias, out)
            elif bits == 3:
                _decode_3(packed, at, scale, bias, out)
            elif bits == 5:
                _decode_5(packed, at, scale, bias, out)
            else:
                _decode_6(packed, at, scale, bias, out)
