"""The encoder of ggml's MXFP4, blocks of 32 weights that share a power of two, byte for byte as its reference.

A block begins with an exponent byte e; then 16 bytes, weight j low and j + 16 high, of E2M1's codes with a sign:
    w = e2m1(q) 2^(e - 127)

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_mxfp4_ref and best_index_mxfp4.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.compare import float_at
from loaders.quantization.kernels.ggml.blocks import BATCH, N, largest, put, put_nibbles
from loaders.quantization.kernels.lanes import I8, I32, Array, Lanes, Value, host_has, kernel, vector

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled, as ggml's kvalues_mxfp4
MIDDLES = (0.5, 1.5, 2.5, 3.5, 5, 7, 10)  # halfway between neighbours of E2M1
QUARTERS = (0, 6, 9, 11, 13, 15, 17)  # by how many quarters of their powers of two MIDDLES are beyond the first


@vector(types.void)
def _write(lanes: Lanes, x: Array, at: Value, inverse: Value, exponent: Value, out: Array, to: Value) -> None:
    """Write a block of MXFP4: each finite weight takes the nearest code, of two as near the lesser magnitude.

    ggml's best_index_mxfp4 tries all sixteen codes and keeps the first of the best, so that a zero has no sign.
    Counting the middles below a magnitude gives the same, since `inverse` is a power of two and products are exact.
    """
    codes, kind = [], ir.VectorType(I32, N // 4)
    for half in range(2):
        pair = []
        for v in lanes.pairs(x, lanes.op("add", at, half * N // 2), N // 2):
            steps = lanes.b.fmul(v, lanes.splat(inverse, N // 4))
            size, code = lanes.absolute(steps), lanes.const(kind, 0)
            for middle in MIDDLES:
                code = lanes.b.sub(
                    code, lanes.b.sext(lanes.b.fcmp_ordered(">", size, lanes.const(v.type, middle)), kind)
                )
            sign = lanes.op("and_", lanes.op("lshr", lanes.b.bitcast(steps, kind), 28), 8)
            is_zero = lanes.b.icmp_unsigned("==", code, lanes.const(kind, 0))
            pair.append(lanes.b.select(is_zero, code, lanes.b.or_(code, sign)))
        codes.append(lanes.woven(*pair))
    put(lanes, exponent, out, to, 0)
    put_nibbles(lanes, codes, out, to, 1)


@kernel
def _write_slowly(x, at, out, to):  # type: ignore[no-untyped-def]
    """Write a block of MXFP4 with exponent byte 0 by ggml's definition, best_index_mxfp4.

    Its scale, 2^-128, is a subnormal float32 whose inverse is infinite, so `_write` cannot serve.
    """
    out[to : to + 17] = 0
    for i in range(N):
        value, best = float_at(x, at + i), np.float32(0)
        for code in range(len(E2M1)):
            error = abs(np.float32(E2M1[code]) * np.float32(2.0**-128) - value)
            if code == 0 or error < best:
                best, found = error, code
        out[to + 1 + i % 16] |= np.uint8(found << (4 * (i // 16)))


@vector(types.boolean)
def _bases(lanes: Lanes, x: Array, start: Value, bases: Array) -> Value:
    """Store what `_search` takes of BATCH blocks of bfloat16s; return whether it may be used for all of them.

    A base is the bits of the first middle less 31. The first middle is a quarter of the scale, and a sixteenth of the
    power of two of the block's largest magnitude.
    """
    if x.holds != types.uint16:
        return ir.Constant(ir.IntType(1), 0)
    places = [lanes.op("add", start, N * slot) for slot in range(BATCH)]
    tops = lanes.each_reduced("umax", [lanes.op("and_", lanes.load(x, place, N), 0x7FFF) for place in places])
    lanes.store(lanes.op("sub", lanes.op("and_", tops, 0x7F80), (4 << 7) + 31), bases, ir.Constant(start.type, 0))
    is_large = lanes.b.icmp_unsigned(">=", tops, lanes.const(tops.type, 5 << 7))
    is_finite = lanes.b.icmp_unsigned("<", tops, lanes.const(tops.type, 0x7F80))
    return lanes.reduce("and", lanes.b.and_(is_large, is_finite))


@vector(types.void)
def _search(lanes: Lanes, x: Array, at: Value, base: Value, out: Array, to: Value) -> None:
    """Write a block of MXFP4 of bfloat16s by their own bits, as `_write` does.

    Middles are multiples of quarters of their powers of two, which are 32 apart among the bits: what is above a middle
    is one quarter further on, if quarters begin just above their multiples. Other dtypes never come here.
    """
    if x.holds != types.uint16:
        return
    bits = lanes.load(x, at, N)
    magnitudes = lanes.op("and_", bits, 0x7FFF)
    beyond = lanes.call(f"llvm.usub.sat.v{N}i16", bits.type, magnitudes, lanes.splat(base, N))
    if host_has("avx512bw"):
        codes = [sum(quarter > first for first in QUARTERS) for quarter in range(32)]
        signed = [*codes, *(code | 8 if code else 0 for code in codes)]
        low, high = (lanes.const(bits.type, signed[half : half + 32]) for half in (0, 32))
        index = lanes.b.or_(lanes.op("lshr", beyond, 5), lanes.op("and_", lanes.op("lshr", bits, 10), 32))
        found = lanes.call("llvm.x86.avx512.vpermi2var.hi.512", bits.type, low, index, high)
    else:
        zero = lanes.const(bits.type, 0)
        found = zero
        for first in QUARTERS:
            is_above = lanes.b.icmp_signed(">", beyond, lanes.const(bits.type, 32 * first + 31))
            found = lanes.b.sub(found, lanes.b.sext(is_above, bits.type))
        sign = lanes.op("and_", lanes.op("lshr", bits, 12), 8)
        found = lanes.b.or_(found, lanes.b.select(lanes.b.icmp_unsigned("==", found, zero), zero, sign))
    exponent = lanes.op("add", lanes.op("lshr", lanes.op("add", base, 31), 7), 2)
    put(lanes, lanes.b.trunc(exponent, I8), out, to, 0)
    put_nibbles(lanes, [lanes.part(found, half, N // 2) for half in range(2)], out, to, 1)


@kernel
def _encode_block(x, block, out):  # type: ignore[no-untyped-def]
    """Encode one block of MXFP4.

    The exponent is floorf(log2f(amax)) - 2: log2 in float64 rounded to float32 is what a correctly rounded log2f gives,
    which just below a power of two may be the next integer.
    """
    top = largest(x, block * N)
    exponent = np.int32(0)
    if top > 0 and top < np.inf:
        exponent = np.int32(math.floor(np.float32(math.log2(np.float64(top))))) + np.int32(125)
    exponent &= np.int32(0xFF)  # below 2^-125 the byte wraps round, as in ggml: such blocks come out as zeros
    if top == 0:
        out[block * 17 : (block + 1) * 17] = 0
    elif exponent == 0:
        _write_slowly(x, block * N, out, block * 17)
    else:
        inverse = np.float32(2.0 ** (128.0 - np.float64(exponent)))
        _write(x, block * N, inverse, np.uint8(exponent), out, block * 17)


@kernel
def encode_mxfp4(x, out):  # type: ignore[no-untyped-def]
    """Encode MXFP4. x: (n,), n a multiple of 32; out: uint8 (n / 32 * 17,)."""
    bases, blocks = np.empty(BATCH, np.uint16), x.size // N
    for first in range(0, blocks, BATCH):
        stop = min(first + BATCH, blocks)
        if stop - first == BATCH and _bases(x, first * N, bases):
            for k in range(BATCH):
                _search(x, (first + k) * N, bases[k], out, (first + k) * 17)
        else:
            for block in range(first, stop):
                _encode_block(x, block, out)
