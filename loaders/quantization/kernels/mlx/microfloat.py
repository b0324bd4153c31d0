"""Four and eight bit floats in small groups that share a scale, as MLX codes them: mxfp4, mxfp8, nvfp4.

The arithmetic is that of mlx.core.quantize 0.32 on a CPU (mlx/backend/cpu/quantized.cpp), in float32:
    s = largest magnitude / greatest, rounded to the weights' dtype; greatest is 6 for E2M1, 448 for E4M3
    mxfp4, mxfp8: scale = 2^ceil(log2(s)), 1 where s is 0, stored as its exponent + 127
    nvfp4: scale = s as E4M3, halves to even
    code = the value nearest to w / scale; of two as near, E2M1 takes the lesser magnitude, E4M3 the even code
The bytes differ from MLX's on purpose in two cases where MLX's decode to nonsense: exponents below -127 become -127
(MLX's wrap around, to infinities), and weights beyond E2M1's reach take its greatest value (MLX's become 0 from about
2^9 times that value on).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import casts
from loaders.quantization.kernels.lanes import I8, I16, I32, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.mlx.affine import packed_bits

LANES = 16  # groups of all three formats are multiples of this
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by code
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between neighbours of E2M1
GREATEST = {4: 6.0, 8: 448.0}  # by bits: the greatest value of a code
LARGEST_E4M3 = 0x7E  # the code of 448


# --- scales


@vector(types.float32)
def _largest(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the largest of LANES magnitudes; a NaN counts as 0."""
    values = lanes.absolute(lanes.floats(x, at, LANES))
    values = lanes.larger(values, lanes.const(values.type, 0))
    while (width := values.type.count // 2) > 0:
        values = lanes.larger(lanes.part(values, 0, width), lanes.part(values, 1, width))
    return lanes.b.extract_element(values, ir.Constant(I32, 0))


@kernel
def group_absmax(x, group, absmax):  # type: ignore[no-untyped-def]
    """Find the largest magnitude of each group. x: (n,) raw weights, n = len(absmax) * group; absmax: float32."""
    for g in range(absmax.size):
        top = np.float32(0)
        for at in range(g * group, (g + 1) * group, LANES):
            top = max(top, _largest(x, at))
        absmax[g] = top


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values to a dtype, and keep them as float32."""
    return casts.to_float32(casts.cast(values, "F32", dtype), dtype)


@cache
def _power_limits() -> np.ndarray:
    """Give, by exponent bits, the greatest float32 bits whose log2, in float32, is still that exponent: uint32 (256,).

    MLX takes ceil(log2(s)) in float32. Just above a power of two log2 rounds down to the integer, so that the ceiling
    is not yet the next one. Comparing bits with these limits, found by bisection, gives the same without a logarithm.
    """
    exponents = np.arange(1, 255, dtype=np.uint32) << 23
    low, high = exponents.copy(), exponents + np.uint32(0x7FFFFF)
    wanted = (np.arange(1, 255) - 127).astype(np.float32)
    for _ in range(24):
        middle = low + (high - low + np.uint32(1)) // np.uint32(2)
        logs = np.log2(middle.view(np.float32).astype(np.float64)).astype(np.float32)
        low, high = np.where(logs <= wanted, middle, low), np.where(logs <= wanted, high, middle - np.uint32(1))
    return np.concatenate([[0x400000], low, [0x7F800000]]).astype(np.uint32)


def power_scales(absmax: np.ndarray, bits: int, dtype: str) -> np.ndarray:
    """Return the scales of mxfp4 (bits 4) or mxfp8 (8) as exponents + 127: uint8. absmax: float32, one a group."""
    s = _rounded(absmax / np.float32(GREATEST[bits]), dtype)
    raw = s.view(np.uint32)
    found = (raw >> 23) + (raw > _power_limits()[raw >> 23])
    return np.where(s == 0, 127, np.minimum(found, 254)).astype(np.uint8)


def power_values(stored: np.ndarray) -> np.ndarray:
    """Return 2^(stored - 127) as float32. 2^-127, for 0, is subnormal, and has no exponent bits."""
    exponents = stored.astype(np.uint32)
    return np.where(exponents == 0, np.uint32(0x400000), exponents << np.uint32(23)).astype(np.uint32).view(np.float32)


@cache
def e4m3_table() -> np.ndarray:
    """Return the values of E4M3 by code: float32 (256,). 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    values[exponent * 8 + mantissa == 127] = np.nan
    return np.where(codes >> 7, -values, values).astype(np.float32)


def e4m3_scales(absmax: np.ndarray, dtype: str) -> np.ndarray:
    """Return the scales of nvfp4 as E4M3 codes, at most 448: uint8. absmax: float32, one a group."""
    s = _rounded(absmax / np.float32(GREATEST[4]), dtype)
    values = e4m3_table()[: LARGEST_E4M3 + 1]
    above = np.minimum(np.searchsorted(values, s), LARGEST_E4M3)
    below = np.maximum(above - 1, 0)
    to_above, to_below = values[above].astype(np.float64) - s, s.astype(np.float64) - values[below]
    is_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    return np.where(is_below, below, above).astype(np.uint8)


# --- codes


@vector(types.void)
def _code_e2m1(lanes: Lanes, x: Array, at: Value, scale: Value, packed: Array) -> None:
    """Code LANES weights from `at` on into bytes of two codes, the first low. A zero has no sign."""
    kind = ir.VectorType(I32, LANES)
    values = lanes.b.fdiv(lanes.floats(x, at, LANES), lanes.splat(scale, LANES))
    sizes, codes = lanes.absolute(values), lanes.const(kind, 0)
    for middle in MIDDLES:
        is_above = lanes.b.fcmp_ordered(">", sizes, lanes.const(sizes.type, middle))
        codes = lanes.b.sub(codes, lanes.b.sext(is_above, kind))
    is_negative = lanes.b.fcmp_ordered("<", values, lanes.const(values.type, 0))
    is_something = lanes.b.icmp_unsigned("!=", codes, lanes.const(kind, 0))
    signed = lanes.b.select(lanes.b.and_(is_negative, is_something), lanes.op("or_", codes, 8), codes)
    pairs = packed_bits(lanes, lanes.b.trunc(signed, ir.VectorType(I8, LANES)), 4)
    lanes.store(pairs, packed, lanes.op("lshr", at, 1))


@vector(types.void)
def _code_e4m3(lanes: Lanes, x: Array, at: Value, scale: Value, packed: Array) -> None:
    """Code LANES weights from `at` on into a byte each: halves to even, at most 448; a NaN becomes 448.

    Normal numbers are rounded by integers, with the exponents' biases of 127 and 7 subtracted: 120. Below 2^-6 E4M3's
    steps are 2^-9, which is the last bit of 2^14 + x: the sum rounds x and leaves the code in the low bits.
    """
    kind = ir.VectorType(I32, LANES)
    values = lanes.b.fdiv(lanes.floats(x, at, LANES), lanes.splat(scale, LANES))
    raw = lanes.b.bitcast(values, kind)
    size = lanes.op("and_", raw, 0x7FFFFFFF)
    odd = lanes.op("and_", lanes.op("lshr", size, 20), 1)
    normal = lanes.op("lshr", lanes.b.add(lanes.op("add", size, 0x7FFFF - (120 << 23)), odd), 20)
    added = lanes.op("fadd", lanes.b.bitcast(size, values.type), 2.0**14)
    subnormal = lanes.op("and_", lanes.b.bitcast(added, kind), 0xFF)
    is_normal = lanes.b.icmp_unsigned(">=", size, lanes.const(kind, 121 << 23))
    codes = lanes.b.select(is_normal, normal, subnormal)
    greatest = lanes.const(kind, LARGEST_E4M3)
    # 0x43E80000 is 464, halfway to 480, where E4M3 has its NaN; infinities and NaN have greater bits still.
    is_over = lanes.b.or_(
        lanes.b.icmp_unsigned(">", codes, greatest), lanes.b.icmp_unsigned(">=", size, lanes.const(kind, 0x43E80000))
    )
    codes = lanes.b.or_(
        lanes.b.select(is_over, greatest, codes), lanes.op("lshr", lanes.op("and_", raw, -(1 << 31)), 24)
    )
    lanes.store(lanes.b.trunc(codes, ir.VectorType(I8, LANES)), packed, at)


@kernel
def encode(x, group, bits, scales, packed):  # type: ignore[no-untyped-def]
    """Code whole groups. x: (n,) raw weights; scales: float32 (n / group,); packed: uint8 (n * bits / 8,).

    A group of scale 0 gets codes 0.
    """
    for g in range(scales.size):
        start, scale = g * group, scales[g]
        if scale == 0:
            packed[start * bits // 8 : (start + group) * bits // 8] = 0
            continue
        for at in range(start, start + group, LANES):
            if bits == 4:
                _code_e2m1(x, at, scale, packed)
            else:
                _code_e4m3(x, at, scale, packed)


# --- decoding


@vector(types.void)
def _decode_e2m1(lanes: Lanes, packed: Array, at: Value, scale: Value, out: Array) -> None:
    """Decode LANES weights from `at` on."""
    half = LANES // 2
    wide = lanes.b.zext(lanes.load(packed, lanes.op("lshr", at, 1), half), ir.VectorType(I16, half))
    pairs = lanes.b.or_(lanes.op("and_", wide, 15), lanes.op("shl", lanes.op("lshr", wide, 4), 8))
    codes = lanes.b.zext(lanes.b.bitcast(pairs, ir.VectorType(I8, LANES)), ir.VectorType(I32, LANES))
    lanes.store(lanes.b.fmul(lanes.lookup(E2M1, codes), lanes.splat(scale, LANES)), out, at)


@kernel
def decode_e2m1(packed, scales, group, out):  # type: ignore[no-untyped-def]
    """Decode whole groups, value * scale. packed: uint8 (n / 2,); scales: float32 (n / group,); out: float32 (n,)."""
    for g in range(scales.size):
        for at in range(g * group, (g + 1) * group, LANES):
            _decode_e2m1(packed, at, scales[g], out)
