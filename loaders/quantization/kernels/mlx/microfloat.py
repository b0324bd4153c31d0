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

from loaders.quantization.kernels import nearest, rounding, thresholds
from loaders.quantization.kernels.compare import CHUNK, NONFINITE, WRONG, Group, add_groups, add_slowly, settle
from loaders.quantization.kernels.lanes import F32, I8, I16, I32, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.mlx.affine import packed_bits
from loaders.quantization.kernels.mlx.microfloat_scales import (
    LANES,
    absmax_16,
    absmax_32,
    e4m3_codes,
    largest_number,
    power_codes,
    scale_values,
)
from loaders.quantization.kernels.nearest import is_off_symmetric
from loaders.quantization.kernels.rounding import GROUPS
from loaders.quantization.kernels.thresholds import searches

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by code
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between neighbours of E2M1
# rank among the bounds of `thresholds_of` -> code; the last is spare
SEARCHED = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7, 7)


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


@cache
def thresholds_of(mode: str) -> np.ndarray:
    """Return the bounds of E2M1's codes among bfloat16 bits: int16 (256 * 16,), a row for each stored scale.

    Of two codes as near, that of the lesser magnitude is taken: beyond a middle means farther from zero. So below zero,
    "above a bound" is "not beyond its middle". By a scale of zero, every weight but a NaN has the code 0.
    """
    values = scale_values(mode)
    bounds = np.array([-middle for middle in reversed(MIDDLES)] + [*MIDDLES], np.float32)
    scales, limits = (each.reshape(-1) for each in np.broadcast_arrays(values[:, None], bounds))

    def is_above(weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # rows of scales that do not occur
            quotients = weights / scales
        return np.asarray(np.where(limits < 0, ~(quotients < limits), quotients > limits))

    rows = np.full((256, 16), thresholds.NEVER, np.int16)
    rows[:, :14] = thresholds.last_below(is_above, scales.size).reshape(256, 14)
    rows[values == 0] = [-thresholds.NEVER] * 7 + [thresholds.NEVER] * 9
    return rows.reshape(-1)


@vector(types.void)
def _search_32(lanes: Lanes, x: Array, at: Value, rows: Array, row: Value, packed: Array) -> None:
    """Code a group of 32 bfloat16s by a row of thresholds."""
    if thresholds.is_searched(x):
        thresholds.store_e2m1(lanes, SEARCHED, x, at, rows, [row], packed)


@vector(types.void)
def _search_16(lanes: Lanes, x: Array, at: Value, rows: Array, row: Value, next_row: Value, packed: Array) -> None:
    """Code two groups of 16 bfloat16s by their rows of thresholds."""
    if thresholds.is_searched(x):
        thresholds.store_e2m1(lanes, SEARCHED, x, at, rows, [row, next_row], packed)


@vector(types.void)
def _code_e4m3(lanes: Lanes, x: Array, at: Value, scale: Value, packed: Array) -> None:
    """Code 32 weights into a byte each: halves to even, at most 448; a NaN becomes 448.

    The scale is a power of two, so that the product with its inverse is the quotient.
    """
    inverse = lanes.splat(lanes.b.fdiv(ir.Constant(F32, 1), scale), 16)
    even, odd = (rounding.quick_e4m3(lanes, lanes.b.fmul(values, inverse)) for values in lanes.pairs(x, at, 32))
    rounding.store_byte_pairs(lanes, even, odd, packed, at)


@kernel
def _code_group(x, start, group, bits, scale, packed):  # type: ignore[no-untyped-def]
    """Code a group by divisions. By a scale of 0 all codes are 0."""
    if scale == 0:
        packed[start * bits // 8 : (start + group) * bits // 8] = 0
    elif bits == 4:
        for at in range(start, start + group, LANES):
            _code_e2m1(x, at, scale, packed)
    else:
        for at in range(start, start + group, 32):
            _code_e4m3(x, at, scale, packed)


@kernel
def encode(x, group, bits, greatest, limits, values, rows, packed, scales):  # type: ignore[no-untyped-def]
    """Code whole groups of 32, or of 16 for nvfp4. x: (n,) raw weights; packed: uint8 (n * bits / 8,).

    greatest: of the codes, float32; limits: `power_limits`; values: `scale_values` of the mode, both in
    microfloat_scales.py; rows: `thresholds_of` the mode, for four bits; scales: uint8 (n / group,), as stored.
    """
    absmax, codes = np.zeros(GROUPS, np.float32), np.empty(GROUPS, np.uint8)
    for first in range(0, scales.size, GROUPS):
        count, has_nan = min(GROUPS, scales.size - first), True
        if count == GROUPS:
            start = first * group
            has_nan = absmax_16(x, start, absmax) if group == 16 else absmax_32(x, start, absmax)
        if has_nan:
            for slot in range(count):
                absmax[slot] = largest_number(x, (first + slot) * group, group)
        if group == 16:
            e4m3_codes(x, absmax, codes, 0)
        else:
            power_codes(x, absmax, greatest, limits, codes, 0)
        scales[first : first + count] = codes[:count]
        if bits == 8 or has_nan or not searches(x):
            for g in range(first, first + count):
                _code_group(x, g * group, group, bits, values[scales[g]], packed)
        elif group == 32:
            for g in range(first, first + GROUPS):
                _search_32(x, g * group, rows, np.int64(scales[g]), packed)
        else:
            for g in range(first, first + GROUPS, 2):
                _search_16(x, g * group, rows, np.int64(scales[g]), np.int64(scales[g + 1]), packed)


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


@vector(types.void)
def _decode_e4m3(lanes: Lanes, codes: Array, at: Value, scale: Value, out: Array) -> None:
    """Decode 32 weights from `at` on."""
    values = rounding.from_e4m3(lanes, lanes.load(codes, at, 32))
    lanes.store(lanes.b.fmul(values, lanes.splat(scale, 32)), out, at)


@kernel
def decode_e4m3(codes, scales, out):  # type: ignore[no-untyped-def]
    """Decode groups of 32, value * scale. codes: uint8 (n,); scales: float32 (n / 32,); out: float32 (n,)."""
    for g in range(scales.size):
        _decode_e4m3(codes, g * 32, scales[g], out)


def _add(
    lanes: Lanes,
    bits: int,
    group: int,
    x: Array,
    packed: Array,
    scales: Array,
    values: Array,
    terms: Value,
    start: Value,
    stop: Value,
    totals: Array,
) -> Value:
    """Sum the differences of weights [start, stop), a multiple of 32, and their decoded codes: `compare.add_groups`."""
    symmetric = nearest.Symmetric(lanes, terms)

    def scale(g: Value) -> Value:
        code = lanes.b.zext(lanes.b.load(lanes.b.gep(scales.data, [g])), g.type)
        return lanes.splat(lanes.b.load(lanes.b.gep(values.data, [code])), LANES)

    def of_group(index: Value) -> Group:
        if group == 32:
            own = scale(index)
        else:  # of 32 weights' even and odd places each, the first eight belong to the first group
            first = lanes.op("shl", index, 1)
            parts = (lanes.part(scale(each), 0, LANES // 2) for each in (first, lanes.op("add", first, 1)))
            own = lanes.join([*parts])
        return own, *symmetric.bounds(lanes.absolute(own))

    def decoded(at: Value, own: Group) -> tuple[Value, Value]:
        if bits == 8:
            even, odd = rounding.pairs_of_e4m3(lanes, packed, at, 32)
        else:
            codes = lanes.b.zext(lanes.load(packed, lanes.op("lshr", at, 1), LANES), ir.VectorType(I32, LANES))
            parts = (lanes.op("and_", codes, 15), lanes.op("lshr", codes, 4))
            even, odd = (lanes.lookup(E2M1, each) for each in parts)
        return lanes.b.fmul(even, own[0]), lanes.b.fmul(odd, own[0])

    def is_off(source: Value, value: Value, own: Group) -> Value:
        return symmetric.is_far(source, value, own[1:])

    return add_groups(lanes, x, start, stop, ir.Constant(start.type, 32), totals, of_group, decoded, is_off)


@vector(types.float64)
def _add_mxfp4(
    lanes: Lanes,
    x: Array,
    packed: Array,
    scales: Array,
    values: Array,
    terms: Value,
    start: Value,
    stop: Value,
    totals: Array,
) -> Value:
    return _add(lanes, 4, 32, x, packed, scales, values, terms, start, stop, totals)


@vector(types.float64)
def _add_mxfp8(
    lanes: Lanes,
    x: Array,
    packed: Array,
    scales: Array,
    values: Array,
    terms: Value,
    start: Value,
    stop: Value,
    totals: Array,
) -> Value:
    return _add(lanes, 8, 32, x, packed, scales, values, terms, start, stop, totals)


@vector(types.float64)
def _add_nvfp4(
    lanes: Lanes,
    x: Array,
    packed: Array,
    scales: Array,
    values: Array,
    terms: Value,
    start: Value,
    stop: Value,
    totals: Array,
) -> Value:
    return _add(lanes, 4, 16, x, packed, scales, values, terms, start, stop, totals)


@kernel
def compare(x, packed, scales, values, group, bits, terms, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x, (n,) raw weights, and what is decoded to `sums`; see compare.py.

    scales: uint8 (n / group,), as stored; values: `scale_values`. Weights are also held to be the nearest of their
    codes: by `terms`, top, half, floor and slope, half the gap between codes is half * scale + floor + slope * |value|,
    and codes end at top * scale.
    """
    totals = np.zeros(4, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        whole = start + (stop - start) // 32 * 32
        if bits == 8:
            largest = _add_mxfp8(x, packed, scales, values, terms, start, whole, totals)
        elif group == 32:
            largest = _add_mxfp4(x, packed, scales, values, terms, start, whole, totals)
        else:
            largest = _add_nvfp4(x, packed, scales, values, terms, start, whole, totals)
        is_off = totals[3] != 0
        if not settle(largest, totals, sums):
            whole = start
        if whole < stop:
            decoded, own = np.empty(stop - whole, np.float32), np.empty((stop - whole) // group, np.float32)
            for g in range(own.size):
                own[g] = values[scales[whole // group + g]]
            if bits == 4:
                decode_e2m1(packed[whole // 2 : stop // 2], own, group, decoded)
            else:
                decode_e4m3(packed[whole:stop], own, decoded)
            add_slowly(x[whole:stop], decoded, 0, stop - whole, sums)
            is_off |= is_off_symmetric(x[whole:stop], decoded, group, own, terms)
        if is_off and not sums[NONFINITE]:  # a NaN may spoil the scale of its whole group: bounds by it say nothing
            sums[WRONG] = 1
