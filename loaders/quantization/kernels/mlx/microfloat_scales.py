"""The scales that small groups of four and eight bit floats share, as MLX finds and stores them: see microfloat.py."""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import rounding
from loaders.quantization.kernels.lanes import F32, I32, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.rounding import GROUPS

LANES = 16  # groups of all three formats are multiples of this
GREATEST = {4: 6.0, 8: 448.0}  # by bits: the greatest value of a code


@vector(types.float32)
def _largest(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the largest of LANES magnitudes; a NaN counts as 0."""
    values = lanes.absolute(lanes.floats(x, at, LANES))
    values = lanes.larger(values, lanes.const(values.type, 0))
    while (width := values.type.count // 2) > 0:
        values = lanes.larger(lanes.part(values, 0, width), lanes.part(values, 1, width))
    return lanes.b.extract_element(values, ir.Constant(I32, 0))


@kernel
def largest_number(x, start, group):  # type: ignore[no-untyped-def]
    """Return the largest magnitude of a group; a NaN counts as 0."""
    found = np.float32(0)
    for at in range(start, start + group, LANES):
        found = max(found, _largest(x, at))
    return found


def _absmax(lanes: Lanes, x: Array, start: Value, group: int) -> Value:
    """Return the largest magnitudes of GROUPS groups as float32; where a group holds a NaN, it is one."""
    places = [lanes.op("add", start, group * slot) for slot in range(GROUPS)]
    if x.element is F32:
        kind = ir.VectorType(I32, GROUPS)
        found = ir.Constant(kind, ir.Undefined)
        for slot, place in enumerate(places):
            bits = rounding.magnitude_bits(lanes, x, place, group)
            found = lanes.b.insert_element(found, bits, ir.Constant(I32, slot))
        return lanes.b.bitcast(found, ir.VectorType(F32, GROUPS))
    tops = lanes.each_reduced("umax", [lanes.op("and_", lanes.load(x, place, group), 0x7FFF) for place in places])
    return lanes.from_bf16(tops) if x.holds == types.uint16 else lanes.from_f16(tops)


@vector(types.boolean)
def absmax_16(lanes: Lanes, x: Array, start: Value, absmax: Array) -> Value:
    """Find the largest magnitudes of GROUPS groups of 16, float32; return whether one is NaN."""
    return _store_absmax(lanes, x, start, 16, absmax)


@vector(types.boolean)
def absmax_32(lanes: Lanes, x: Array, start: Value, absmax: Array) -> Value:
    """Find the largest magnitudes of GROUPS groups of 32, float32; return whether one is NaN."""
    return _store_absmax(lanes, x, start, 32, absmax)


def _store_absmax(lanes: Lanes, x: Array, start: Value, group: int, absmax: Array) -> Value:
    found = _absmax(lanes, x, start, group)
    lanes.store(found, absmax, ir.Constant(ir.IntType(64), 0))
    return lanes.reduce("or", lanes.b.fcmp_unordered("uno", found, found))


@vector(types.void)
def e4m3_codes(lanes: Lanes, x: Array, absmax: Array, scales: Array, at: Value) -> None:
    """Store the scales of GROUPS groups of nvfp4: magnitude / 6 in the dtype of x, as E4M3."""
    values = lanes.op("fdiv", lanes.load(absmax, ir.Constant(at.type, 0), GROUPS), GREATEST[4])
    rounding.store_bytes(lanes, rounding.to_e4m3(lanes, rounding.like(lanes, x, values)), scales, at)


@vector(types.void)
def power_codes(
    lanes: Lanes, x: Array, absmax: Array, greatest: Value, limits: Array, scales: Array, at: Value
) -> None:
    """Store the scales of GROUPS groups of mxfp: ceil(log2(s)) + 127, at most 254, or 127 where s is 0.

    Numbers of 16 bits are powers of two or far enough above them for log2 to tell; for float32 see `power_limits`. The
    exponent -127, whose powers are subnormal, ends at 2^-127.
    """
    values = lanes.load(absmax, ir.Constant(at.type, 0), GROUPS)
    values = rounding.like(lanes, x, lanes.b.fdiv(values, lanes.splat(greatest, GROUPS)))
    bits = lanes.b.bitcast(values, rounding.ints(values))
    if x.element is F32:
        exponents, above = lanes.op("lshr", bits, 23), lanes.const(bits.type, 0)
        for slot in range(GROUPS):
            place = ir.Constant(I32, slot)
            exponent = lanes.b.zext(lanes.b.extract_element(exponents, place), at.type)
            limit = lanes.b.load(lanes.b.gep(limits.data, [exponent]))
            is_above = lanes.b.icmp_unsigned(">", lanes.b.extract_element(bits, place), limit)
            above = lanes.b.insert_element(above, lanes.b.zext(is_above, I32), place)
        found = lanes.b.add(exponents, above)
    else:
        found = lanes.op("lshr", lanes.op("add", bits, 0x7FFFFF), 23)
        is_least = lanes.b.icmp_unsigned("<=", bits, lanes.const(bits.type, 0x400000))
        found = lanes.b.select(is_least, lanes.const(bits.type, 0), found)
    most = lanes.const(bits.type, 254)
    found = lanes.b.select(lanes.b.icmp_unsigned("<", found, most), found, most)
    is_zero = lanes.b.icmp_unsigned("==", bits, lanes.const(bits.type, 0))
    rounding.store_bytes(lanes, lanes.b.select(is_zero, lanes.const(bits.type, 127), found), scales, at)


@cache
def power_limits() -> np.ndarray:
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


@cache
def scale_values(mode: str) -> np.ndarray:
    """Return the values of the stored scales of a mode: float32 (256,)."""
    return e4m3_table() if mode == "nvfp4" else power_values(np.arange(256))
