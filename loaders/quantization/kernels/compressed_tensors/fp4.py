"""E2M1 codes by group, NVFP4 and MXFP4, as compressed-tensors computes them.

NVFP4, groups of 16:  global = fl(1 / amax) * 2688 in the weights' dtype, amax of all fused partners (1 if infinite);
    scale = E4M3 of clamp(global * fl(amax16 / 6), 0, 448), and 0.125 where that is zero;
    code = E2M1 of w / (scale / global) in float32
MXFP4, groups of 32:  p = the power of two at or below amax32, where a mantissa of 1.75 or more counts as the next;
    byte = exponent of p - 2, plus 127, at least 0;  code = E2M1 of w / 2^(byte - 127) in the weights' dtype.
    In float16 a scale below 2^-24 is zero, and becomes 1: byte 127.
The first code of a byte is in its low half.

Source: compressed_tensors 0.20, quantization/utils/helpers.py (calculate_qparams, generate_gparam) and mxfp_utils.py
(round_to_power_2, generate_mx_scales).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import casts, rounding, thresholds
from loaders.quantization.kernels.compare import CHUNK, add_pairs
from loaders.quantization.kernels.compressed_tensors.groups import MX_GROUP, NV_GROUP
from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.mlx import microfloat, microfloat_scales
from loaders.quantization.kernels.rounding import BATCH, GROUPS, STEP, float_of_bits, top_bits, top_bits_1, top_bits_16
from loaders.quantization.kernels.thresholds import searches

LEAST_SCALE = 0x20  # the code of 0.125, E4M3's eps in helpers.py's _get_dtype_eps, which replaces a scale of zero
VALUES = tuple(sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
# rank among the bounds of `mx_thresholds` -> code
SEARCHED = (15, 14, 13, 12, 11, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7)
# by dtype: mantissa bits, exponent bits, exponent bias
LAYOUT = {"BF16": (7, 8, 127), "F16": (10, 5, 15), "F32": (23, 8, 127)}


@vector(types.void)
def _code_16(lanes: Lanes, x: Array, at: Value, scale: Value, packed: Array) -> None:
    """Code a group of NVFP4. Its quotients stay float32, since the scale that divides is float32."""
    quotients = lanes.b.fdiv(lanes.floats(x, at, NV_GROUP), lanes.splat(scale, NV_GROUP))
    rounding.store_nibbles(lanes, rounding.to_e2m1(lanes, quotients), packed, lanes.op("lshr", at, 1))


@vector(types.void)
def _code_32(lanes: Lanes, x: Array, at: Value, scale: Value, packed: Array) -> None:
    """Code a group of MXFP4. Its quotients are rounded to the weights' dtype, which is that of the scale."""
    quotients = lanes.b.fdiv(lanes.floats(x, at, MX_GROUP), lanes.splat(scale, MX_GROUP))
    codes = rounding.to_e2m1(lanes, rounding.like(lanes, x, quotients))
    rounding.store_nibbles(lanes, codes, packed, lanes.op("lshr", at, 1))


@vector(types.void)
def _nv_scales(lanes: Lanes, x: Array, tops: Array, at: Value, whole: Value, codes: Array, factors: Array) -> None:
    """Compute the E4M3 codes of GROUPS groups' scales, and the scales as decoded divided by the global one."""
    values = rounding.values_of_bits(lanes, x, lanes.load(tops, at, GROUPS))
    least = rounding.like(lanes, x, lanes.op("fdiv", values, 6.0))
    wholes = lanes.splat(whole, GROUPS)
    code = rounding.to_e4m3(lanes, lanes.b.fmul(wholes, least))
    nothing = lanes.const(code.type, 0)
    code = lanes.b.select(lanes.b.icmp_signed("==", code, nothing), lanes.const(code.type, LEAST_SCALE), code)
    rounding.store_bytes(lanes, code, codes, at)
    lanes.store(
        lanes.b.fdiv(rounding.from_e4m3(lanes, lanes.b.trunc(code, ir.VectorType(I8, GROUPS))), wholes), factors, at
    )


@vector(types.float32)
def _of_e4m3(lanes: Lanes, code: Value) -> Value:
    """Return the float32 value of an E4M3 code."""
    values = rounding.from_e4m3(lanes, lanes.splat(code, 1))
    return lanes.b.extract_element(values, ir.Constant(I32, 0))


@kernel
def largest(x):  # type: ignore[no-untyped-def]
    """Return the largest magnitude; it is NaN if one is. x: (n,)."""
    whole = x.size // STEP * STEP
    top = top_bits(x, 0, whole)
    for at in range(whole, x.size):
        top = max(top, top_bits_1(x, at))
    return float_of_bits(x, top)


@kernel
def encode_nv(x, whole_scale, packed, scales):  # type: ignore[no-untyped-def]
    """Encode NVFP4. x: (n,), n = scales.size * 16; whole_scale: the global scale, float32.

    packed: uint8 (n / 2,); scales: E4M3 codes, uint8 (n / 16,).
    """
    tops, codes, factors = np.zeros(BATCH, np.uint32), np.empty(BATCH, np.uint8), np.empty(BATCH, np.float32)
    for first in range(0, scales.size, BATCH):
        count = min(BATCH, scales.size - first)
        for slot in range(count):
            tops[slot] = top_bits_16(x, (first + slot) * NV_GROUP)
        for slot in range(0, count, GROUPS):
            _nv_scales(x, tops, slot, whole_scale, codes, factors)
        for slot in range(count):
            scales[first + slot] = codes[slot]
            _code_16(x, (first + slot) * NV_GROUP, factors[slot], packed)


@cache
def mx_thresholds() -> np.ndarray:
    """Return the bounds of E2M1's codes among bfloat16 bits: int16 (256 * 16,), a row for each stored scale.

    Of two codes as near, the even one is taken. Between them is a bound at zero, since the sign of a weight is stored
    even where it rounds to zero.
    """
    scales = np.repeat(microfloat_scales.power_values(np.arange(256)), 15)
    middles = np.tile([*reversed(microfloat.MIDDLES), 0, *microfloat.MIDDLES], 256).astype(np.float32)
    is_even = np.tile([*([True, False] * 4)[:7], True, *([True, False] * 4)[:7]], 256)  # of the lesser code beside it
    is_negative = np.tile([True] * 7 + [False] * 8, 256)
    is_zero = np.tile([False] * 7 + [True] + [False] * 7, 256)

    def is_above(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):  # of the least scale's infinite quotients
            quotients = casts.to_float32(casts.cast(weights / scales, "F32", "BF16"), "BF16")
        size = np.where(is_negative, -quotients, quotients)
        is_beyond = np.where(is_even, size > middles, size >= middles)
        return np.asarray(np.where(is_zero, ~(quotients < 0), is_beyond ^ is_negative))

    rows = np.full((256, 16), thresholds.NEVER, np.int16)
    rows[:, :15] = thresholds.last_below(is_above, scales.size).reshape(256, 15)
    return rows.reshape(-1)


@vector(types.boolean)
def _mx_scales(lanes: Lanes, x: Array, start: Value, scales: Array, first: Value) -> Value:
    """Store the scales of GROUPS groups of bfloat16s as `encode_mx` finds them; return whether one holds a NaN."""
    if not thresholds.is_searched(x):
        return ir.Constant(ir.IntType(1), 1)
    places = [lanes.op("add", start, MX_GROUP * slot) for slot in range(GROUPS)]
    tops = lanes.each_reduced("umax", [lanes.op("and_", lanes.load(x, place, MX_GROUP), 0x7FFF) for place in places])
    exponents = lanes.op("lshr", lanes.op("add", tops, 1 << 5), 7)
    two = lanes.const(tops.type, 2)
    least = lanes.b.select(lanes.b.icmp_unsigned(">", exponents, two), exponents, two)
    lanes.store(lanes.b.trunc(lanes.b.sub(least, two), ir.VectorType(I8, GROUPS)), scales, first)
    return lanes.reduce("or", lanes.b.icmp_unsigned(">", tops, lanes.const(tops.type, 0x7F80)))


@vector(types.void)
def _search_mx(lanes: Lanes, x: Array, at: Value, rows: Array, row: Value, packed: Array) -> None:
    """Code a group of bfloat16s by a row of thresholds."""
    if thresholds.is_searched(x):
        thresholds.store_e2m1(lanes, SEARCHED, x, at, rows, [row], packed)


@kernel
def encode_mx(x, mantissa, mask, bias, rows, packed, scales):  # type: ignore[no-untyped-def]
    """Encode MXFP4. x: (n,), n = scales.size * 32; mantissa bits, exponent mask and bias are those of its dtype.

    rows: `mx_thresholds`; packed: uint8 (n / 2,); scales: exponents plus 127, uint8 (n / 32,).
    """
    for first in range(0, scales.size, GROUPS):
        stop = min(first + GROUPS, scales.size)
        if searches(x) and stop - first == GROUPS and not _mx_scales(x, first * MX_GROUP, scales, first):
            for g in range(first, stop):
                _search_mx(x, g * MX_GROUP, rows, np.int64(scales[g]), packed)
        else:
            _divide_mx(x, mantissa, mask, bias, packed, scales, first, stop)


@kernel
def _divide_mx(x, mantissa, mask, bias, packed, scales, first, stop):  # type: ignore[no-untyped-def]
    """Encode groups [first, stop) of MXFP4 by divisions."""
    # round_to_power_2 adds this to the bits of a magnitude: a quarter, which carries into the exponent from 1.75 on.
    carry = np.uint32(1 << (mantissa - 2))
    for g in range(first, stop):
        start = g * MX_GROUP
        exponent = ((top_bits(x, start, start + MX_GROUP) + carry) >> mantissa) & mask
        byte = max(0, np.int64(exponent) - bias + 125) if exponent else 0
        scale = np.float32(2.0 ** (byte - 127))
        if bias == 15 and byte < 103:  # float16 has no 2^-25: see above
            byte, scale = 127, np.float32(1)
        scales[g] = byte
        _code_32(x, start, scale, packed)


# --- decoding


def _values(lanes: Lanes, packed: Array, at: Value, scale: Value, out: Array, count: int) -> None:
    """Decode a group of `count` weights."""
    codes = rounding.load_nibbles(lanes, packed, lanes.op("lshr", at, 1), count)
    lanes.store(lanes.b.fmul(lanes.lookup(VALUES, codes), lanes.splat(scale, count)), out, at)


@vector(types.void)
def _values_16(lanes: Lanes, packed: Array, at: Value, scale: Value, out: Array) -> None:
    _values(lanes, packed, at, scale, out, NV_GROUP)


@vector(types.void)
def _values_32(lanes: Lanes, packed: Array, at: Value, scale: Value, out: Array) -> None:
    _values(lanes, packed, at, scale, out, MX_GROUP)


@vector(types.float32)
def _power(lanes: Lanes, byte: Value) -> Value:
    """Return 2^(byte - 127): the byte is a float32's exponent bits, but 0 is 2^-127, a subnormal, and 255 is NaN."""
    bits = lanes.op("shl", lanes.b.zext(byte, I32), 23)
    bits = lanes.b.select(lanes.b.icmp_unsigned("==", bits, ir.Constant(I32, 0)), ir.Constant(I32, 1 << 22), bits)
    is_nan = lanes.b.icmp_unsigned("==", byte, ir.Constant(I8, 255))
    return lanes.b.bitcast(lanes.b.select(is_nan, ir.Constant(I32, 0x7FC00000), bits), F32)


@kernel
def decode_nv(packed, scales, whole_scale, out):  # type: ignore[no-untyped-def]
    """Decode NVFP4: the code's value times (scale / global). packed, scales (E4M3): uint8; out: float32 (n,)."""
    for g in range(scales.size):
        _values_16(packed, g * NV_GROUP, _of_e4m3(scales[g]) / whole_scale, out)


@kernel
def decode_mx(packed, scales, out):  # type: ignore[no-untyped-def]
    """Decode MXFP4: the code's value times 2^(scale - 127). packed, scales: uint8; out: float32 (n,)."""
    for g in range(scales.size):
        _values_32(packed, g * MX_GROUP, _power(scales[g]), out)


@kernel
def compare_nv(x, packed, scales, whole_scale, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x, (n,) raw weights, and what `decode_nv` makes of the rest to `sums`: see compare.py."""
    tile, totals = np.empty(CHUNK, np.float32), np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        own, decoded = slice(start // NV_GROUP, stop // NV_GROUP), tile[: stop - start]
        decode_nv(packed[start // 2 : stop // 2], scales[own], whole_scale, decoded)
        add_pairs(x[start:stop], decoded, totals, sums)


@kernel
def compare_mx(x, packed, scales, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x, (n,) raw weights, and what `decode_mx` makes of the rest to `sums`: see compare.py."""
    tile, totals = np.empty(CHUNK, np.float32), np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        decoded = tile[: stop - start]
        decode_mx(packed[start // 2 : stop // 2], scales[start // MX_GROUP : stop // MX_GROUP], decoded)
        add_pairs(x[start:stop], decoded, totals, sums)
