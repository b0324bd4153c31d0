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

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import rounding
from loaders.quantization.kernels.compressed_tensors.groups import MX_GROUP, NV_GROUP
from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.rounding import BATCH, GROUPS, STEP, float_of_bits, top_bits, top_bits_1, top_bits_16

LEAST_SCALE = 0x20  # the code of 0.125, E4M3's eps in helpers.py's _get_dtype_eps, which replaces a scale of zero
VALUES = tuple(sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
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


@kernel
def encode_mx(x, mantissa, mask, bias, packed, scales):  # type: ignore[no-untyped-def]
    """Encode MXFP4. x: (n,), n = scales.size * 32; mantissa bits, exponent mask and bias are those of its dtype.

    packed: uint8 (n / 2,); scales: exponents plus 127, uint8 (n / 32,).
    """
    # round_to_power_2 adds this to the bits of a magnitude: a quarter, which carries into the exponent from 1.75 on.
    carry = np.uint32(1 << (mantissa - 2))
    for g in range(scales.size):
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
