"""E4M3 codes of bfloat16 weights by their own bytes, sixty-four at once, where AVX-512VBMI looks bytes up in registers.

A quotient of two normal bfloat16s, rounded to bfloat16 and to E4M3, has mantissa bits that depend on the mantissas of
weight and scale alone, seven bits each. Its exponent is the difference of theirs, less one or not. So a normal code is
a sum: bits 4 to 11 of the weight, which are the low bits of its exponent and the first three of its mantissa, less
eight times the scale's exponent, plus what a table of 128 bytes has for the weight's mantissa. It is taken modulo 256.
A quotient below 2^-6 has no normal code, and its vector is left to `rounding.quick_e4m3`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import casts
from loaders.quantization.kernels.lanes import I8, I16, I32, Array, Lanes, Value, host_has, vector

WIDE = 64  # weights coded at once
MANTISSAS = 128  # of bfloat16
LEAST_EXPONENT = 6  # the least normal number of E4M3 is 2^-6


@cache
def mantissa_codes() -> np.ndarray:
    """Return what a weight's mantissa adds to its code, modulo 256, by scale and weight: uint8 (128 * 128,).

    That is its code by a scale of the same exponent, less its upper three bits.
    """
    mantissas = np.arange(MANTISSAS)
    values = (1 + mantissas / MANTISSAS).astype(np.float32)
    quotients = casts.cast((values / values[:, None]).reshape(-1), "F32", "BF16")
    found = casts.to_float32(quotients, "BF16").reshape(MANTISSAS, MANTISSAS)
    # Of numbers from 1/2 to 1, codes are 1/16 apart, and from there on 1/8: 6 * 8 and 7 * 8 are those of 1/2 and of 1.
    codes = np.where(found < 1, 6 * 8 + np.rint(found * 16) - 8, 7 * 8 + np.rint(found * 8) - 8)
    added: np.ndarray = codes.astype(np.int64) - (mantissas >> 4)
    return added.astype(np.uint8).reshape(-1)


def is_looked_up(x: Array) -> bool:
    """Whether weights of the dtype of `x` are coded so on the machine that the kernel is compiled for."""
    return bool(x.holds == types.uint16 and host_has("avx512vbmi"))


@vector(types.boolean)
def looks_up(lanes: Lanes, x: Array) -> Value:
    """Return `is_looked_up` of an array to a kernel, as a constant."""
    return ir.Constant(ir.IntType(1), int(is_looked_up(x)))


@vector(types.uint16)
def begin_scale(lanes: Lanes, scale: Value, table: Array, own: Array, to: Value) -> Value:
    """Put into 128 bytes of `own`, from `to` on, what mantissas add by this scale, its exponent included.

    table: `mantissa_codes`. Returns the bits of the least magnitude whose code is normal.
    """
    bits = lanes.op("lshr", lanes.b.bitcast(scale, I32), 16)
    row = lanes.b.zext(lanes.op("mul", lanes.op("and_", bits, MANTISSAS - 1), MANTISSAS), to.type)
    exponent = lanes.b.trunc(lanes.op("shl", lanes.op("lshr", bits, 7), 3), I8)
    less = lanes.splat(exponent, MANTISSAS)
    lanes.store(lanes.b.sub(lanes.load(table, row, MANTISSAS), less), own, to)
    return lanes.b.trunc(lanes.op("sub", bits, LEAST_EXPONENT << 7), I16)


@vector(types.boolean)
def code_wide(lanes: Lanes, x: Array, at: Value, own: Array, place: Value, least: Value, out: Array) -> Value:
    """Code WIDE weights; return whether that is right for all, none being less than `least`.

    `own`, from `place` on, and `least` are from `begin_scale`.
    """
    if not is_looked_up(x):
        return ir.Constant(ir.IntType(1), 0)
    kind, half = ir.VectorType(I8, WIDE), WIDE // 2
    words = [lanes.load(x, lanes.op("add", at, part * half), half) for part in range(2)]

    def each_byte(words: list[Value], upper: int) -> Value:
        first, second = (lanes.b.bitcast(each, kind) for each in words)
        return lanes.shuffle(first, range(upper, 2 * WIDE, 2), second)

    low, high = (lanes.load(own, lanes.op("add", place, part * WIDE), WIDE) for part in range(2))
    added = lanes.call("llvm.x86.avx512.vpermi2var.qi.512", kind, low, each_byte(words, 0), high)
    shifted = each_byte([lanes.op("lshr", each, 4) for each in words], 0)
    sign = lanes.op("and_", each_byte(words, 1), -0x80)
    lanes.store(lanes.b.or_(lanes.b.add(shifted, added), sign), out, at)
    first, second = (lanes.op("and_", each, 0x7FFF) for each in words)
    smaller = lanes.b.select(lanes.b.icmp_unsigned("<", first, second), first, second)
    is_small = lanes.b.icmp_unsigned("<", smaller, lanes.splat(least, half))
    return lanes.b.icmp_unsigned("==", lanes.b.bitcast(is_small, I32), ir.Constant(I32, 0))
