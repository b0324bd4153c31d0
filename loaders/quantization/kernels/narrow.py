"""Rounding in lanes: to bfloat16 and float16 as arithmetic in those dtypes does, to integers, E4M3 and E2M1, and back.

All roundings are to nearest, ties to even. compressed-tensors computes in the dtype of the weights, and a step of torch
in bfloat16 or float16 is the float32 result, rounded: `like` is that rounding, by the dtype of an array.

E4M3: a sign, four exponent bits (bias 7), three of mantissa, up to 448, code 0x7F is NaN. E2M1: a sign, two exponent
bits (bias 1), one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F32, I8, I16, I32, Array, Lanes, Value, vector

INTEGERS = 12582912.0  # 1.5 * 2^23: its sum with a small number holds that number, rounded, in its low bits


def ints(value: Value) -> Value:
    """The int32 vector as wide as another."""
    return ir.VectorType(I32, value.type.count)


def floats(value: Value) -> Value:
    """The float32 vector as wide as another."""
    return ir.VectorType(F32, value.type.count)


def like(lanes: Lanes, x: Array, values: Value) -> Value:
    """float32 lanes rounded to the dtype of `x`, still as float32."""
    if x.holds == types.uint16:
        return _to_bf16(lanes, values)
    return _to_f16(lanes, values) if x.holds == types.int16 else values


def _even(lanes: Lanes, bits: Value, dropped: int) -> Value:
    """Bits of a magnitude plus what makes dropping the low ones round to nearest even."""
    odd = lanes.op("and_", lanes.op("lshr", bits, dropped), 1)
    return lanes.b.add(lanes.op("add", bits, (1 << (dropped - 1)) - 1), odd)


def _to_bf16(lanes: Lanes, values: Value) -> Value:
    bits = _even(lanes, lanes.b.bitcast(values, ints(values)), 16)
    return lanes.b.bitcast(lanes.op("and_", bits, -65536), values.type)


def _to_f16(lanes: Lanes, values: Value) -> Value:
    """Without the conversion instruction, which not every CPU has. Below 2^-14 the steps are 2^-24, as 0.5's are."""
    bits = lanes.b.bitcast(values, ints(values))
    sign = lanes.op("and_", bits, -(1 << 31))
    magnitude = lanes.b.bitcast(lanes.op("and_", bits, 0x7FFFFFFF), values.type)
    small = lanes.op("fsub", lanes.op("fadd", magnitude, 0.5), 0.5)
    rounded = lanes.op("and_", _even(lanes, lanes.op("and_", bits, 0x7FFFFFFF), 13), -8192)
    is_small = lanes.b.fcmp_ordered("<", magnitude, lanes.const(values.type, 2.0**-14))
    is_large = lanes.b.fcmp_ordered(">=", magnitude, lanes.const(values.type, 65520.0))
    found = lanes.b.select(is_small, lanes.b.bitcast(small, bits.type), rounded)
    found = lanes.b.select(is_large, lanes.const(bits.type, 0x7F800000), found)
    return lanes.b.bitcast(lanes.b.or_(found, sign), values.type)


@vector(types.float32)
def quotient_like(lanes: Lanes, x: Array, value: Value, divisor: Value) -> Value:
    """A quotient in the arithmetic of the dtype of `x`, for float32 scalars."""
    one = like(lanes, x, lanes.splat(lanes.b.fdiv(value, divisor), 1))
    return lanes.b.extract_element(one, ir.Constant(I32, 0))


@vector(types.float32)
def rounded_like(lanes: Lanes, x: Array, value: Value) -> Value:
    """A float32 scalar rounded to the dtype of `x`."""
    return lanes.b.extract_element(like(lanes, x, lanes.splat(value, 1)), ir.Constant(I32, 0))


def to_integers(lanes: Lanes, values: Value, lowest: int, highest: int) -> Value:
    """int32 lanes: the nearest integers within bounds. NaN becomes a bound; magnitudes are below 2^22 or clamped."""
    within = clamp(lanes, values, float(lowest), float(highest))
    return lanes.op("sub", lanes.b.bitcast(lanes.op("fadd", within, INTEGERS), ints(values)), 0x4B400000)


def clamp(lanes: Lanes, values: Value, lowest: float, highest: float) -> Value:
    low, high = lanes.const(values.type, lowest), lanes.const(values.type, highest)
    above = lanes.b.select(lanes.b.fcmp_ordered(">", values, low), values, low)
    return lanes.b.select(lanes.b.fcmp_ordered("<", above, high), above, high)


def to_e4m3(lanes: Lanes, values: Value) -> Value:
    """int32 lanes: E4M3 codes, magnitudes beyond 448 as 448, NaN as NaN."""
    bits = lanes.b.bitcast(values, ints(values))
    magnitude = lanes.b.bitcast(lanes.op("and_", bits, 0x7FFFFFFF), values.type)
    top = lanes.const(values.type, 448.0)
    within = lanes.b.select(lanes.b.fcmp_unordered("<", magnitude, top), magnitude, top)
    normal = lanes.op("sub", lanes.op("lshr", _even(lanes, lanes.b.bitcast(within, bits.type), 20), 20), 120 << 3)
    # 16384 + x keeps x in steps of 2^-9, as the codes below 2^-6 have it
    small = lanes.op("and_", lanes.b.bitcast(lanes.op("fadd", within, 16384.0), bits.type), 0xF)
    is_small = lanes.b.fcmp_ordered("<", within, lanes.const(values.type, 2.0**-6))
    code = lanes.b.select(is_small, small, normal)
    code = lanes.b.select(lanes.b.fcmp_unordered("uno", values, values), lanes.const(bits.type, 0x7F), code)
    return lanes.b.or_(code, lanes.op("and_", lanes.op("lshr", bits, 24), 0x80))


def to_e2m1(lanes: Lanes, values: Value) -> Value:
    """int32 lanes: E2M1 codes, magnitudes beyond 6 as 6; the sign is set below zero (a minus zero is zero)."""
    bits = lanes.b.bitcast(values, ints(values))
    magnitude = lanes.b.bitcast(lanes.op("and_", bits, 0x7FFFFFFF), values.type)
    top = lanes.const(values.type, 6.0)
    within = lanes.b.select(lanes.b.fcmp_ordered("<", magnitude, top), magnitude, top)
    normal = lanes.op("sub", lanes.op("lshr", _even(lanes, lanes.b.bitcast(within, bits.type), 22), 22), 126 << 1)
    small = lanes.op("and_", lanes.b.bitcast(lanes.op("fadd", within, INTEGERS / 2), bits.type), 3)  # in steps of 0.5
    is_small = lanes.b.fcmp_ordered("<", within, lanes.const(values.type, 1.0))
    code = lanes.b.select(is_small, small, normal)
    is_negative = lanes.b.fcmp_ordered("<", values, lanes.const(values.type, 0.0))
    return lanes.b.or_(code, lanes.b.select(is_negative, lanes.const(bits.type, 8), lanes.const(bits.type, 0)))


def from_e4m3(lanes: Lanes, codes: Value) -> Value:
    """The float32 lanes of E4M3 codes in int32 lanes: their bits, moved, times 2^120; exact below 2^-6 too."""
    kind = floats(codes)
    magnitude = lanes.op("and_", codes, 0x7F)
    value = lanes.op("fmul", lanes.b.bitcast(lanes.op("shl", magnitude, 20), kind), 2.0**120)
    is_nan = lanes.b.icmp_unsigned("==", magnitude, lanes.const(codes.type, 0x7F))
    value = lanes.b.select(is_nan, lanes.const(kind, float("nan")), value)
    sign = lanes.op("shl", lanes.op("and_", codes, 0x80), 24)
    return lanes.b.bitcast(lanes.b.or_(lanes.b.bitcast(value, codes.type), sign), kind)


def store_bytes(lanes: Lanes, codes: Value, out: Array, at: Value) -> None:
    """int32 lanes, a byte each."""
    lanes.store(lanes.b.trunc(codes, ir.VectorType(I8, codes.type.count)), out, at)


def store_nibbles(lanes: Lanes, codes: Value, out: Array, at: Value) -> None:
    """int32 lanes below 16, two to a byte, the first low."""
    count = codes.type.count
    pairs = lanes.b.bitcast(lanes.b.trunc(codes, ir.VectorType(I16, count)), ir.VectorType(I32, count // 2))
    lanes.store(lanes.b.trunc(lanes.b.or_(pairs, lanes.op("lshr", pairs, 12)), ir.VectorType(I8, count // 2)), out, at)


def load_bytes(lanes: Lanes, packed: Array, at: Value, count: int) -> Value:
    """`count` bytes as int32 lanes."""
    return lanes.b.zext(lanes.load(packed, at, count), ir.VectorType(I32, count))


def load_nibbles(lanes: Lanes, packed: Array, at: Value, count: int) -> Value:
    """`count` codes of four bits, the first of a byte low, as int32 lanes; `at` is a byte."""
    wide = lanes.b.zext(lanes.load(packed, at, count // 2), ir.VectorType(I16, count // 2))
    pairs = lanes.b.or_(lanes.op("and_", wide, 15), lanes.op("shl", lanes.op("and_", wide, 0xF0), 4))
    return lanes.b.zext(lanes.b.bitcast(pairs, ir.VectorType(I8, count)), ir.VectorType(I32, count))


def magnitude_bits(lanes: Lanes, x: Array, at: Value, count: int) -> Value:
    """The bits of the largest of `count` magnitudes: they sort as integers, NaN last."""
    bits = lanes.load(x, at, count)
    if x.element is F32:
        return lanes.reduce("umax", lanes.op("and_", lanes.b.bitcast(bits, ir.VectorType(I32, count)), 0x7FFFFFFF))
    return lanes.b.zext(lanes.reduce("umax", lanes.op("and_", bits, 0x7FFF)), I32)


def value_of_bits(lanes: Lanes, x: Array, bits: Value) -> Value:
    """The float32 scalar whose bits in the dtype of `x` are the int32 `bits`."""
    if x.element is F32:
        return lanes.b.bitcast(bits, F32)
    one = lanes.splat(lanes.b.trunc(bits, I16), 1)
    value = lanes.from_bf16(one) if x.holds == types.uint16 else lanes.from_f16(one)
    return lanes.b.extract_element(value, ir.Constant(I32, 0))


@vector(types.uint32)
def top_bits_32(lanes: Lanes, x: Array, at: Value) -> Value:
    """The bits of the largest of 32 magnitudes."""
    return magnitude_bits(lanes, x, at, 32)


@vector(types.uint32)
def top_bits_16(lanes: Lanes, x: Array, at: Value) -> Value:
    """The bits of the largest of 16 magnitudes."""
    return magnitude_bits(lanes, x, at, 16)


@vector(types.uint32)
def top_bits_1(lanes: Lanes, x: Array, at: Value) -> Value:
    """The bits of one magnitude."""
    return magnitude_bits(lanes, x, at, 1)


@vector(types.float32)
def float_of_bits(lanes: Lanes, x: Array, bits: Value) -> Value:
    """A magnitude of the dtype of `x` by its bits."""
    return value_of_bits(lanes, x, bits)
