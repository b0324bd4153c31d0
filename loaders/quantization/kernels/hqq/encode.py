"""HQQ's codes of groups whose scales and zeros are known: code = clamp(round(w * scale + zero), 0, top), in float32.

What is stored are 1 / scale and zero, rounded to the compute dtype to nearest even, as torch rounds them.

Source: hqq 0.2.8, hqq/core/quantize.py (Quantizer.quantize). solver.py finds the scales and zeros.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import I8, I16, I32, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.rounding import like


def codes_of(lanes: Lanes, scaled: Value, zero: Value, top: Value) -> Value:
    """Return clamp(round(scaled + zero), 0, top), as float32."""
    above = lanes.larger(rounded(lanes, lanes.b.fadd(scaled, zero)), lanes.const(scaled.type, 0))
    return lanes.b.select(lanes.b.fcmp_ordered("<", above, top), above, top)


def rounded(lanes: Lanes, value: Value) -> Value:
    return lanes.call(f"llvm.rint.v{value.type.count}f32", value.type, value)


def _store_codes(lanes: Lanes, codes: Value, shift: Value, out: Array, at: Value) -> None:
    """Put codes into the bits of `out` (uint8 or int32) from `shift` on, which are zeros before."""
    count = codes.type.count
    wide = lanes.b.fptoui(codes, ir.VectorType(I32, count))
    moved = lanes.b.shl(wide, lanes.splat(lanes.b.trunc(shift, I32), count))
    narrow = lanes.b.trunc(moved, ir.VectorType(I8, count)) if out.element == I8 else moved
    lanes.store(lanes.b.or_(lanes.load(out, at, count), narrow), out, at)


def _code_row(
    count: int, lanes: Lanes, x: Array, at: Value, scale: Value, zero: Value, top: Value, shift: Value, out: Array
) -> None:
    """Code `count` weights of one group."""
    scaled = lanes.b.fmul(lanes.floats(x, at, count), lanes.splat(scale, count))
    codes = codes_of(lanes, scaled, lanes.splat(zero, count), lanes.splat(top, count))
    _store_codes(lanes, codes, shift, out, at)


@vector(types.void)
def _code_row_16(
    lanes: Lanes, x: Array, at: Value, scale: Value, zero: Value, top: Value, shift: Value, out: Array
) -> None:
    _code_row(16, lanes, x, at, scale, zero, top, shift, out)


@vector(types.void)
def _code_row_8(
    lanes: Lanes, x: Array, at: Value, scale: Value, zero: Value, top: Value, shift: Value, out: Array
) -> None:
    _code_row(8, lanes, x, at, scale, zero, top, shift, out)


@vector(types.void)
def _put(lanes: Lanes, value: Value, out: Array, at: Value) -> None:
    """Store a float32 scalar in the dtype of `out`; a NaN becomes the quiet one."""
    one = lanes.splat(value, 1)
    if out.holds == types.uint16:
        bits = lanes.op("lshr", lanes.b.bitcast(like(lanes, out, one), ir.VectorType(I32, 1)), 16)
        is_nan = lanes.b.fcmp_unordered("uno", one, one)
        bits = lanes.b.select(is_nan, lanes.const(bits.type, 0x7FC0), bits)
        one = lanes.b.trunc(bits, ir.VectorType(I16, 1))
    elif out.holds == types.int16:
        one = lanes.to_f16(one)
    lanes.store(one, out, at)


@kernel
def _store(scales, zeros, out_scales, out_zeros):  # type: ignore[no-untyped-def]
    for g in range(scales.size):
        _put(np.float32(1) / scales[g], out_scales, g)
        _put(zeros[g], out_zeros, g)


@kernel
def code_rows(x, size, scales, zeros, top, shift, out, out_scales, out_zeros):  # type: ignore[no-untyped-def]
    """Code groups that lie one after another, into the bits from `shift` on, and store their scales and zeros.

    x: (n,); out: uint8 or int32 (n,); out_scales, out_zeros: (groups,) of the compute dtype.
    """
    _store(scales, zeros, out_scales, out_zeros)
    for g in range(scales.size):
        if size % 16 == 0:
            for at in range(g * size, (g + 1) * size, 16):
                _code_row_16(x, at, scales[g], zeros[g], top, shift, out)
        else:
            for at in range(g * size, (g + 1) * size, 8):
                _code_row_8(x, at, scales[g], zeros[g], top, shift, out)


def _code_across(
    count: int, lanes: Lanes, x: Array, g: Value, scales: Array, zeros: Array, top: Value, shift: Value, out: Array
) -> None:
    """Code one weight of each of `count` groups from group g on."""
    scaled = lanes.b.fmul(lanes.floats(x, g, count), lanes.load(scales, g, count))
    codes = codes_of(lanes, scaled, lanes.load(zeros, g, count), lanes.splat(top, count))
    _store_codes(lanes, codes, shift, out, g)


@vector(types.void)
def _code_across_16(
    lanes: Lanes, x: Array, g: Value, scales: Array, zeros: Array, top: Value, shift: Value, out: Array
) -> None:
    _code_across(16, lanes, x, g, scales, zeros, top, shift, out)


@vector(types.void)
def _code_across_1(
    lanes: Lanes, x: Array, g: Value, scales: Array, zeros: Array, top: Value, shift: Value, out: Array
) -> None:
    _code_across(1, lanes, x, g, scales, zeros, top, shift, out)


@kernel
def code_columns(x, size, scales, zeros, top, shift, bits, rows, out, out_scales, out_zeros):  # type: ignore[no-untyped-def]
    """Code groups that are the columns of x (size, groups), and store scales and zeros as `code_rows` does.

    out: uint8 or int32 (rows, groups).
    An item holds the codes of weights `rows` apart: the first from bit `shift` on, the next `bits` below it.
    """
    _store(scales, zeros, out_scales, out_zeros)
    groups = scales.size
    whole = groups // 16 * 16
    out[:] = 0
    for k in range(size):
        weights, items = x[k * groups : (k + 1) * groups], out[k % rows * groups : (k % rows + 1) * groups]
        place = shift - bits * (k // rows)
        for g in range(0, whole, 16):
            _code_across_16(weights, g, scales, zeros, top, place, items)
        for g in range(whole, groups):
            _code_across_1(weights, g, scales, zeros, top, place, items)
