"""Encoders of ggml's ternary super-blocks of 256 weights, TQ1_0 and TQ2_0, byte for byte as its reference quantizers.

In order of bytes:
    TQ1_0  48 bytes of five trits, 4 of four, d                                    w = d (q - 1)
    TQ2_0  64 bytes of four codes, d                                               w = d (q - 1)
d, float16, is the largest magnitude; codes are rounded half away from zero.

Source: llama.cpp, ggml/src/ggml-quants.c, quantize_row_tq1_0_ref and quantize_row_tq2_0_ref.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.ggml.blocks import ROUND_AWAY
from loaders.quantization.kernels.ggml.k_quants import SUPER, put_half, quarters
from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, kernel, vector


@vector(types.void)
def _trits(lanes: Lanes, x: Array, at: Value, inverse: Value, codes: Array) -> None:
    """Put lroundf(x * inverse) + 1 of 256 weights into `codes` as bytes.

    C's lroundf, half away from zero, is the sum with the last float32 below one half, of the same sign, cut to an
    integer.
    """
    kind, wide = ir.VectorType(F32, 32), ir.VectorType(I32, 32)
    for part in range(SUPER // 32):
        v = lanes.b.fmul(lanes.floats(x, lanes.op("add", at, 32 * part), 32), lanes.splat(inverse, 32))
        nudge = lanes.op("or_", lanes.op("and_", lanes.b.bitcast(v, wide), -0x80000000), ROUND_AWAY)
        code = lanes.op("add", lanes.b.fptosi(lanes.b.fadd(v, lanes.b.bitcast(nudge, kind)), wide), 1)
        start = ir.Constant(ir.IntType(64), 32 * part)
        lanes.store(lanes.b.trunc(code, ir.VectorType(I8, 32)), codes, start)


@vector(types.float32)
def _largest(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the largest magnitude of 256 weights."""
    kind = ir.VectorType(F32, 32)
    top = lanes.const(kind, 0)
    for part in range(SUPER // 32):
        top = lanes.larger(lanes.absolute(lanes.floats(x, lanes.op("add", at, 32 * part), 32)), top)
    return lanes.reduce("fmax", top)


@kernel
def _begin_ternary(x, block, out, at, codes):  # type: ignore[no-untyped-def]
    """Store a super-block's scale at `at`, and put its codes into `codes`."""
    top = _largest(x, block * SUPER)
    put_half(out, at, top)
    inverse = np.float32(1) / top if top != 0 else np.float32(0)
    # An infinite inverse makes C's cast undefined; x86 gives code 0 + 1, as an inverse of 0 does here.
    _trits(x, block * SUPER, inverse if inverse < np.inf else np.float32(0), codes)


@kernel
def encode_tq2_0(x, out):  # type: ignore[no-untyped-def]
    """Encode TQ2_0. x: (n,), n a multiple of 256; out: uint8 (n / 256 * 66,)."""
    codes = np.empty(SUPER, np.uint8)
    for block in range(x.size // SUPER):
        at = block * 66
        _begin_ternary(x, block, out, at + 64, codes)
        quarters(codes, 0, out, at, 0)


@kernel
def encode_tq1_0(x, out):  # type: ignore[no-untyped-def]
    """Encode TQ1_0. x: (n,), n a multiple of 256; out: uint8 (n / 256 * 54,).

    A byte holds its trits' number in base 3 as a share of 3^5, scaled to 256 and rounded up: multiplying the byte by 3
    then carries one trit after another out of it, the first one first.
    """
    codes = np.empty(SUPER, np.uint8)
    for block in range(x.size // SUPER):
        at = block * 54
        _begin_ternary(x, block, out, at + 52, codes)
        for i in range(52):
            # The first 32 bytes take weights 32 apart, the next 16 take weights 16 apart, and the last 4 take four
            # weights each, 4 apart; their fifth trit is 0.
            first, step = (i, 32) if i < 32 else (160 + i - 32, 16) if i < 48 else (240 + i - 48, 4)
            trits = np.int32(0)
            for n in range(5):
                trits = trits * np.int32(3)
                if n < 4 or i < 48:
                    trits += np.int32(codes[first + n * step])
            out[at + i] = np.uint8((trits * np.int32(256) + np.int32(242)) // np.int32(243))
