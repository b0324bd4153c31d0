"""HQQ's decoder, in the compute dtype's arithmetic: (code - zero) * scale, rounded after each of the two steps.

Source: hqq 0.2.8, hqq/core/quantize.py, Quantizer.dequantize, as torch computes it on a CPU. No code is shared with the
encoder, which this checks.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.compare import float_at
from loaders.quantization.kernels.lanes import I8, I32, Array, Lanes, Value, kernel, vector

STEP = 16  # values decoded at once, and half as many where groups are no multiple of it


def _rounded(lanes: Lanes, values: Value, like: Array) -> Value:
    """Round float32 lanes to the dtype of an array, nearest even, and keep them as float32; a NaN stays a NaN."""
    if like.holds == types.float32:
        return values
    if like.holds == types.int16:
        return lanes.rounded_to_f16(values)
    bits = lanes.b.bitcast(values, ir.VectorType(I32, values.type.count))
    odd = lanes.op("and_", lanes.op("lshr", bits, 16), 1)
    rounded = lanes.op("and_", lanes.b.add(lanes.op("add", bits, 0x7FFF), odd), -65536)
    is_nan = lanes.b.fcmp_unordered("uno", values, values)
    return lanes.b.select(is_nan, values, lanes.b.bitcast(rounded, values.type))


def codes_at(lanes: Lanes, codes: Array, at: Value, shift: Value, mask: Value, count: int) -> Value:
    """Return `count` codes, the bits under `mask` from `shift` on of items of W_q, as int32 lanes."""
    raw = lanes.load(codes, at, count)
    wide = lanes.b.zext(raw, ir.VectorType(I32, count)) if codes.element == I8 else raw
    return lanes.b.and_(lanes.b.lshr(wide, lanes.splat(shift, count)), lanes.splat(mask, count))


def values_of(lanes: Lanes, codes: Value, scale: Value, zero: Value, like: Array) -> Value:
    """Decode int32 lanes in the arithmetic of the dtype of `like`."""
    offsets = _rounded(lanes, lanes.b.fsub(lanes.b.sitofp(codes, scale.type), zero), like)
    return _rounded(lanes, lanes.b.fmul(offsets, scale), like)


def _decode(
    lanes: Lanes, codes: Array, at: Value, shift: Value, mask: Value, scale: Value, zero: Value, like: Array, out: Array
) -> None:
    """Decode as many codes as `scale` and `zero` have lanes, in the arithmetic of the dtype of `like`."""
    taken = codes_at(lanes, codes, at, shift, mask, scale.type.count)
    lanes.store(values_of(lanes, taken, scale, zero, like), out, at)


@vector(types.void)
def _group(
    lanes: Lanes, codes: Array, start: Value, stop: Value, shift: Value, mask: Value, scales: Array, zeros: Array,
    g: Value, out: Array,
) -> None:  # fmt: skip
    """Decode group g, of a multiple of STEP / 2 values."""
    half = STEP // 2
    whole = lanes.b.add(start, lanes.op("and_", lanes.b.sub(stop, start), -STEP))
    scale, zero = lanes.floats(scales, g, 1), lanes.floats(zeros, g, 1)

    def decode(count: int, at: Value) -> list[Value]:
        first = [0] * count
        _decode(lanes, codes, at, shift, mask, lanes.shuffle(scale, first), lanes.shuffle(zero, first), scales, out)
        return []

    lanes.fold(start, whole, STEP, [], lambda at: decode(STEP, at))
    lanes.fold(whole, stop, half, [], lambda at: decode(half, at))


@vector(types.void)
def _across(
    lanes: Lanes, codes: Array, stop: Value, shift: Value, mask: Value, scales: Array, zeros: Array, out: Array
) -> None:
    """Decode one value of each group, a lane each."""

    def decode(count: int, at: Value) -> list[Value]:
        scale, zero = lanes.floats(scales, at, count), lanes.floats(zeros, at, count)
        _decode(lanes, codes, at, shift, mask, scale, zero, scales, out)
        return []

    whole = lanes.op("and_", stop, -STEP)
    lanes.fold(ir.Constant(stop.type, 0), whole, STEP, [], lambda at: decode(STEP, at))
    lanes.fold(whole, stop, 1, [], lambda at: decode(1, at))


@kernel
def decode_groups(codes, shift, mask, scales, zeros, size, out):  # type: ignore[no-untyped-def]
    """Decode groups of `size` values that lie one after another: see `decode_rows`. shift, mask: int32."""
    for g in range(scales.size):
        _group(codes, g * size, (g + 1) * size, shift, mask, scales, zeros, g, out)


@kernel
def _decode_column(codes, shift, mask, scales, zeros, out):  # type: ignore[no-untyped-def]
    _across(codes, out.size, shift, mask, scales, zeros, out)


def decode_rows(
    codes: np.ndarray, shift: int, mask: int, scales: np.ndarray, zeros: np.ndarray, out: np.ndarray
) -> None:
    """Decode groups that lie one after another, in the arithmetic of the dtype of scales and zeros.

    scales, zeros: raw (groups,), as `kernel_input` gives them; out: float32 (n,). codes: uint8 or int32 (n,), whose
    bits under `mask` from `shift` on are these groups' codes.
    """
    decode_groups(codes, np.int32(shift), np.int32(mask), scales, zeros, out.size // scales.size, out)


def decode_column(
    codes: np.ndarray, shift: int, mask: int, scales: np.ndarray, zeros: np.ndarray, out: np.ndarray
) -> None:
    """Decode one value of each group. All arrays: (n,); otherwise as `decode_rows`."""
    _decode_column(codes, np.int32(shift), np.int32(mask), scales, zeros, out)


@kernel
def ends(scales, zeros, top, rounding, least, room, low, high, half):  # type: ignore[no-untyped-def]
    """Fill in what a grid needs of each group: the values of codes 0 and `top`, and half a step and its roundings.

    `rounding` is the share of a value that roundings may take, `least` their least step, and `room` is added. scales,
    zeros: raw (groups,); low, high, half: float32 (groups,).
    """
    for g in range(scales.size):
        scale, zero = float_at(scales, g), float_at(zeros, g)
        reach = top + abs(zero)
        low[g] = (np.float32(0) - zero) * scale
        high[g] = (top - zero) * scale
        half[g] = scale * (np.float32(0.5) + rounding * reach) + (reach + np.float32(1)) * least + room
