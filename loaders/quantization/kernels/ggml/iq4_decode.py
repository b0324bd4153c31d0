"""Decoders of ggml's IQ4_NL and IQ4_XS, as dequantize_row_iq4_nl and dequantize_row_iq4_xs compute them.

What a block holds is described in iq4.py, of which no code is used here. data: uint8, whole blocks; out: float32.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.intrinsics import half_value
from loaders.quantization.kernels.lanes import kernel

N, SUPER = 32, 256
F = np.float32
TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)  # kvalues_iq4nl


@kernel
def half_at(data, at):  # type: ignore[no-untyped-def]
    """Return the float16 at byte `at`."""
    return half_value(np.uint16(np.int32(data[at]) | (np.int32(data[at + 1]) << 8)))


@kernel
def _levels(data, at, scale, out, to):  # type: ignore[no-untyped-def]
    """Decode 32 weights, whose codes begin at byte `at`."""
    for j in range(16):
        byte = data[at + j]
        out[to + j] = scale * F(TABLE[byte & 15])
        out[to + 16 + j] = scale * F(TABLE[byte >> 4])


@kernel
def iq4_nl(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // N):
        _levels(data, b * 18 + 2, half_at(data, b * 18), out, b * N)


@kernel
def iq4_xs_scale(data, at, j):  # type: ignore[no-untyped-def]
    """Return the factor of d, -32 to 31, of the 32 weights j of the super-block at byte `at`."""
    low = (np.int32(data[at + 4 + j // 2]) >> (4 * (j % 2))) & 15
    high = (np.int32(data[at + 2 + j // 4]) >> (2 * (j % 4))) & 3
    return F((low | (high << 4)) - 32)


@kernel
def iq4_xs(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // SUPER):
        at = b * 136
        for j in range(8):
            _levels(data, at + 8 + 16 * j, half_at(data, at) * iq4_xs_scale(data, at, j), out, b * SUPER + N * j)
