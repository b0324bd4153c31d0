"""Rounding in lanes: to bfloat16 and float16 as arithmetic in those dtypes does, to integers, E4M3 and E2M1, and back.

All roundings are to nearest, ties to even. compressed-tensors computes in the dtype of the weights, and an operation of
torch in bfloat16 or float16 is the float32 result, rounded. `like` is that rounding, by the dtype of an array.

E4M3: a sign, four exponent bits (bias 7), three of mantissa, up to 448, code 0x7F is NaN. E2M1: a sign, two exponent
bits (bias 1), one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F32, I8, I16, I32, Array, Lanes, Value, vector

STEP = 32  # weights coded at once
GROUPS = 16  # scales computed at once: dividing one alone, a core would wait for each division's result
BATCH = 64  # groups whose scales are found before any of them is coded; few enough to stay in the cache until then
# 1.5 * 2^23. Adding it to a float32 of magnitude below 2^22 rounds that to an integer, which is left in the low bits.
INTEGERS = 12582912.0


def ints(value: Value) -> Value:
    """Return the type of int32 vectors as wide as a value."""
    return ir.VectorType(I32, value.type.count)


def floats(value: Value) -> Value:
    """Return the type of float32 vectors as wide as a value."""
    return ir.VectorType(F32, value.type.count)


def like(lanes: Lanes, x: Array, values: Value) -> Value:
    """Round float32 lanes to the dtype of `x`, and keep them as float32."""
    if x.holds == types.uint16:
        return _to_bf16(lanes, values)
    return lanes.rounded_to_f16(values) if x.holds == types.int16 else values


def _even(lanes: Lanes, bits: Value, dropped: int) -> Value:
    """Add to the bits of a magnitude what makes dropping the `dropped` low ones round to nearest even.

    That is just below half of the last kept bit, and one more where that bit is odd.
    """
    odd = lanes.op("and_", lanes.op("lshr", bits, dropped), 1)
    return lanes.b.add(lanes.op("add", bits, (1 << (dropped - 1)) - 1), odd)


def _to_bf16(lanes: Lanes, values: Value) -> Value:
    bits = _even(lanes, lanes.b.bitcast(values, ints(values)), 16)
    return lanes.b.bitcast(lanes.op("and_", bits, -65536), values.type)


@vector(types.float32)
def quotient_like(lanes: Lanes, x: Array, value: Value, divisor: Value) -> Value:
    """Divide float32 scalars in the arithmetic of the dtype of `x`."""
    one = like(lanes, x, lanes.splat(lanes.b.fdiv(value, divisor), 1))
    return lanes.b.extract_element(one, ir.Constant(I32, 0))


def to_integers(lanes: Lanes, values: Value, lowest: int, highest: int) -> Value:
    """Return the nearest integers within bounds below 2^22, as int32 lanes. A NaN becomes the lowest."""
    within = clamp(lanes, values, float(lowest), float(highest))
    # 0x4B400000 are the bits of INTEGERS itself.
    return lanes.op("sub", lanes.b.bitcast(lanes.op("fadd", within, INTEGERS), ints(values)), 0x4B400000)


def clamp(lanes: Lanes, values: Value, lowest: float, highest: float) -> Value:
    """Clamp float32 lanes; a NaN becomes the lowest bound."""
    low, high = lanes.const(values.type, lowest), lanes.const(values.type, highest)
    above = lanes.b.select(lanes.b.fcmp_ordered(">", values, low), values, low)
    return lanes.b.select(lanes.b.fcmp_ordered("<", above, high), above, high)


def to_e4m3(lanes: Lanes, values: Value) -> Value:
    """Return the E4M3 codes of float32 lanes, as int32 lanes: magnitudes beyond 448 as 448, NaN as NaN."""
    bits = lanes.b.bitcast(values, ints(values))
    magnitude = lanes.b.bitcast(lanes.op("and_", bits, 0x7FFFFFFF), values.type)
    top = lanes.const(values.type, 448.0)
    within = lanes.b.select(lanes.b.fcmp_unordered("<", magnitude, top), magnitude, top)
    normal = lanes.op("sub", lanes.op("lshr", _even(lanes, lanes.b.bitcast(within, bits.type), 20), 20), 120 << 3)
    # 120 is the difference of the exponents' biases, 127 and 7. Below 2^-6 E4M3's steps are 2^-9, which is the last bit
    # of 2^14 + x: the sum rounds x to them and leaves the code in the lowest bits.
    small = lanes.op("and_", lanes.b.bitcast(lanes.op("fadd", within, 16384.0), bits.type), 0xF)
    is_small = lanes.b.fcmp_ordered("<", within, lanes.const(values.type, 2.0**-6))
    code = lanes.b.select(is_small, small, normal)
    code = lanes.b.select(lanes.b.fcmp_unordered("uno", values, values), lanes.const(bits.type, 0x7F), code)
    return lanes.b.or_(code, lanes.op("and_", lanes.op("lshr", bits, 24), 0x80))


def to_e2m1(lanes: Lanes, values: Value) -> Value:
    """Return the E2M1 codes of float32 lanes, as int32 lanes: magnitudes beyond 6 as 6.

    The sign is set below zero, also where a value rounds to zero; -0 itself has no sign.
    """
    bits = lanes.b.bitcast(values, ints(values))
    magnitude = lanes.b.bitcast(lanes.op("and_", bits, 0x7FFFFFFF), values.type)
    top = lanes.const(values.type, 6.0)
    within = lanes.b.select(lanes.b.fcmp_ordered("<", magnitude, top), magnitude, top)
    normal = lanes.op("sub", lanes.op("lshr", _even(lanes, lanes.b.bitcast(within, bits.type), 22), 22), 126 << 1)
    # 126 is the difference of the exponents' biases, 127 and 1. Below 1 E2M1's steps are 0.5, as the last bit of
    # INTEGERS / 2 is.
    small = lanes.op("and_", lanes.b.bitcast(lanes.op("fadd", within, INTEGERS / 2), bits.type), 3)
    is_small = lanes.b.fcmp_ordered("<", within, lanes.const(values.type, 1.0))
    code = lanes.b.select(is_small, small, normal)
    is_negative = lanes.b.fcmp_ordered("<", values, lanes.const(values.type, 0.0))
    return lanes.b.or_(code, lanes.b.select(is_negative, lanes.const(bits.type, 8), lanes.const(bits.type, 0)))


def from_e4m3(lanes: Lanes, codes: Value) -> Value:
    """Return the float32 lanes of E4M3 codes (int8 lanes), exactly."""
    return _from_moved_e4m3(lanes, _moved_e4m3(lanes, codes))


def pairs_of_e4m3(lanes: Lanes, codes: Array, at: Value, count: int) -> tuple[Value, Value]:
    """Return the float32 values of `count` E4M3 codes, those at even places and those at odd ones."""
    words = lanes.b.bitcast(lanes.load(codes, at, count), ir.VectorType(I16, count // 2))
    even, odd = lanes.op("ashr", lanes.op("shl", words, 8), 1), lanes.op("ashr", lanes.op("and_", words, -256), 1)
    return _from_moved_e4m3(lanes, even), _from_moved_e4m3(lanes, odd)


def share_of_e4m3(lanes: Lanes, codes: Value) -> Value:
    """Return 2^-8 of the values of E4M3 codes (int8 lanes) as float32 lanes. None of the codes may be a NaN."""
    return lanes.from_f16(lanes.op("and_", _moved_e4m3(lanes, codes), -0x4080))


def _moved_e4m3(lanes: Lanes, codes: Value) -> Value:
    """Move E4M3 codes to float16's places, int16 lanes; the bit above the exponent's is a second sign.

    There a code is 2^-8 of its value, since float16's exponents have a bias of 15 and E4M3's of 7.
    """
    return lanes.op("shl", lanes.b.sext(codes, ir.VectorType(I16, codes.type.count)), 7)


def _from_moved_e4m3(lanes: Lanes, wide: Value) -> Value:
    """Return the float32 lanes of E4M3 codes that were moved to float16's places."""
    kind = wide.type
    magnitude = lanes.op("and_", wide, 0x3F80)
    is_nan = lanes.b.icmp_unsigned("==", magnitude, lanes.const(kind, 0x3F80))
    signless = lanes.b.select(is_nan, lanes.const(kind, 0x7E00), magnitude)
    halves = lanes.b.or_(signless, lanes.op("and_", wide, -0x8000))
    return lanes.op("fmul", lanes.from_f16(halves), 256.0)


# --- bfloat16s in pairs, without division


@vector(types.float32)
def quick_inverse(lanes: Lanes, x: Array, scale: Value) -> Value:
    """Return 1 / scale where `quick` may be used, else 0.

    It may be used for bfloat16 weights and scales from 2^-100 to 2^100, whose inverses are far from float32's ends.
    """
    return lanes.b.extract_element(quick_inverses(lanes, x, lanes.splat(scale, 1)), ir.Constant(I32, 0))


def quick_inverses(lanes: Lanes, x: Array, scale: Value) -> Value:
    """Return `quick_inverse` of each lane."""
    zero = lanes.const(scale.type, 0.0)
    if x.holds != types.uint16:
        return zero
    is_large = lanes.b.fcmp_ordered(">=", scale, lanes.const(scale.type, 2.0**-100))
    is_small = lanes.b.fcmp_ordered("<=", scale, lanes.const(scale.type, 2.0**100))
    inverse = lanes.b.fdiv(lanes.const(scale.type, 1.0), scale)
    return lanes.b.select(lanes.b.and_(is_large, is_small), inverse, zero)


def quick(lanes: Lanes, values: Value, inverse: Value) -> Value:
    """Return bf16(values / scale) for bfloat16 values and scale, by 1 / scale from `quick_inverse`; still as float32.

    The product x * (1 / scale) rounds as the quotient x / scale does. The two differ by less than 2^-22 of themselves,
    and no quotient lies that near to a number m halfway between two bfloat16s. Such an m is an odd number of nine bits,
    so that m * scale has at least nine significant bits and cannot equal x, which has eight; and since m * scale and x
    are different integers of at most 17 bits, up to a power of two, they differ by at least 2^-17 of themselves. So
    there are no ties either, and Veltkamp's split into high and low bits rounds to bfloat16: 65537 = 2^16 + 1 keeps the
    upper 8 of 24 bits.
    """
    product = lanes.b.fmul(values, lanes.splat(inverse, values.type.count))
    wide = lanes.op("fmul", product, 65537.0)
    return lanes.b.fsub(wide, lanes.b.fsub(wide, product))


def quick_integers(lanes: Lanes, quotients: Value, lowest: int, highest: int, shift: int) -> Value:
    """Return int32 lanes whose low bits are the nearest integers within bounds, plus `shift`.

    The other bits are not cleared: the stores of pairs below mask what they need.
    """
    within = clamp(lanes, quotients, float(lowest), float(highest))
    return lanes.b.bitcast(lanes.op("fadd", within, INTEGERS + shift), ints(quotients))


def quick_e4m3(lanes: Lanes, quotients: Value) -> Value:
    """Return the E4M3 codes of float32 lanes, as int32 lanes; there is no NaN among them.

    Times 2^-120, float32's exponents have E4M3's bias, and E4M3's subnormal numbers are subnormal float32s: one
    rounding of the bits serves for both.
    """
    bits = lanes.b.bitcast(quotients, ints(quotients))
    magnitude = lanes.b.bitcast(lanes.op("and_", bits, 0x7FFFFFFF), quotients.type)
    moved = lanes.b.bitcast(lanes.op("fmul", magnitude, 2.0**-120), bits.type)
    code = lanes.op("lshr", _even(lanes, moved, 20), 20)
    top = lanes.const(bits.type, 0x7E)
    code = lanes.b.select(lanes.b.icmp_signed("<", code, top), code, top)
    return lanes.b.or_(code, lanes.op("and_", lanes.op("lshr", bits, 24), 0x80))


def store_byte_pairs(lanes: Lanes, even: Value, odd: Value, out: Array, at: Value) -> None:
    """Store codes of pairs, a byte each: the low bytes of int32 lanes of even and of odd places."""
    both = lanes.b.or_(lanes.op("and_", even, 0xFF), lanes.op("shl", odd, 8))
    narrow = lanes.b.trunc(both, ir.VectorType(I16, both.type.count))
    lanes.store(lanes.b.bitcast(narrow, ir.VectorType(I8, 2 * both.type.count)), out, at)


def store_nibble_pairs(lanes: Lanes, even: Value, odd: Value, out: Array, at: Value) -> None:
    """Store codes of pairs, two to a byte, the even one low: the low four bits of int32 lanes."""
    both = lanes.b.or_(lanes.op("and_", even, 0xF), lanes.op("shl", odd, 4))
    lanes.store(lanes.b.trunc(both, ir.VectorType(I8, both.type.count)), out, at)


# --- stores and loads


def store_bytes(lanes: Lanes, codes: Value, out: Array, at: Value) -> None:
    """Store the low byte of each int32 lane."""
    lanes.store(lanes.b.trunc(codes, ir.VectorType(I8, codes.type.count)), out, at)


def store_nibbles(lanes: Lanes, codes: Value, out: Array, at: Value) -> None:
    """Store int32 lanes below 16, two to a byte, the first low."""
    count = codes.type.count
    pairs = lanes.b.bitcast(lanes.b.trunc(codes, ir.VectorType(I16, count)), ir.VectorType(I32, count // 2))
    lanes.store(lanes.b.trunc(lanes.b.or_(pairs, lanes.op("lshr", pairs, 12)), ir.VectorType(I8, count // 2)), out, at)


def load_bytes(lanes: Lanes, packed: Array, at: Value, count: int) -> Value:
    """Load `count` bytes as int32 lanes."""
    return lanes.b.zext(lanes.load(packed, at, count), ir.VectorType(I32, count))


def load_nibbles(lanes: Lanes, packed: Array, at: Value, count: int) -> Value:
    """Load `count` codes of four bits, the first of a byte low, as int32 lanes; `at` counts bytes."""
    wide = lanes.b.zext(lanes.load(packed, at, count // 2), ir.VectorType(I16, count // 2))
    pairs = lanes.b.or_(lanes.op("and_", wide, 15), lanes.op("shl", lanes.op("and_", wide, 0xF0), 4))
    return lanes.b.zext(lanes.b.bitcast(pairs, ir.VectorType(I8, count)), ir.VectorType(I32, count))


def magnitude_bits(lanes: Lanes, x: Array, at: Value, count: int) -> Value:
    """Return the bits of the largest of `count` magnitudes, as an int32. Magnitudes sort as integers, NaN last."""
    bits = lanes.load(x, at, count)
    if x.element is F32:
        return lanes.reduce("umax", lanes.op("and_", lanes.b.bitcast(bits, ir.VectorType(I32, count)), 0x7FFFFFFF))
    return lanes.b.zext(lanes.reduce("umax", lanes.op("and_", bits, 0x7FFF)), I32)


def values_of_bits(lanes: Lanes, x: Array, bits: Value) -> Value:
    """Return the float32 lanes whose bits in the dtype of `x` are those of int32 lanes."""
    if x.element is F32:
        return lanes.b.bitcast(bits, floats(bits))
    narrow = lanes.b.trunc(bits, ir.VectorType(I16, bits.type.count))
    return lanes.from_bf16(narrow) if x.holds == types.uint16 else lanes.from_f16(narrow)


@vector(types.void)
def symmetric_scales(
    lanes: Lanes, x: Array, tops: Array, at: Value, half: Value, eps: Value, scales: Array, inverses: Array
) -> None:
    """Compute scales of GROUPS groups from the bits of their largest magnitudes: top / half in the dtype of `x`.

    A scale of zero becomes `eps`. `inverses` receives `quick_inverse` of each scale.
    """
    values = values_of_bits(lanes, x, lanes.load(tops, at, GROUPS))
    scale = like(lanes, x, lanes.b.fdiv(values, lanes.splat(half, GROUPS)))
    store_scales(lanes, x, scale, eps, at, scales, inverses)


def store_scales(lanes: Lanes, x: Array, scale: Value, eps: Value, at: Value, scales: Array, inverses: Array) -> None:
    """Store GROUPS scales, `eps` where one is zero, and `quick_inverse` of each."""
    zero = lanes.const(scale.type, 0.0)
    scale = lanes.b.select(lanes.b.fcmp_ordered("==", scale, zero), lanes.splat(eps, GROUPS), scale)
    lanes.store(scale, scales, at)
    lanes.store(quick_inverses(lanes, x, scale), inverses, at)


def value_of_bits(lanes: Lanes, x: Array, bits: Value) -> Value:
    """Return the float32 scalar whose bits in the dtype of `x` are the int32 `bits`."""
    if x.element is F32:
        return lanes.b.bitcast(bits, F32)
    one = lanes.splat(lanes.b.trunc(bits, I16), 1)
    value = lanes.from_bf16(one) if x.holds == types.uint16 else lanes.from_f16(one)
    return lanes.b.extract_element(value, ir.Constant(I32, 0))


@vector(types.uint32)
def top_bits(lanes: Lanes, x: Array, start: Value, stop: Value) -> Value:
    """Return the bits of the largest magnitude of weights [start, stop), whose number is a multiple of STEP.

    NaN counts as the largest.
    """
    kind = ir.VectorType(I32 if x.element is F32 else I16, STEP)

    def larger(at: Value, largest: Value) -> list[Value]:
        magnitudes = lanes.op("and_", lanes.b.bitcast(lanes.load(x, at, STEP), kind), (1 << kind.element.width - 1) - 1)
        return [lanes.b.select(lanes.b.icmp_unsigned(">", magnitudes, largest), magnitudes, largest)]

    [found] = lanes.fold(start, stop, STEP, [lanes.const(kind, 0)], larger)
    largest = lanes.reduce("umax", found)
    return largest if x.element is F32 else lanes.b.zext(largest, I32)


@vector(types.uint32)
def top_bits_16(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the bits of the largest of 16 magnitudes."""
    return magnitude_bits(lanes, x, at, 16)


@vector(types.uint32)
def top_bits_1(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the bits of one magnitude."""
    return magnitude_bits(lanes, x, at, 1)


@vector(types.float32)
def float_of_bits(lanes: Lanes, x: Array, bits: Value) -> Value:
    """Return a magnitude of the dtype of `x` by its bits, as float32."""
    return value_of_bits(lanes, x, bits)
