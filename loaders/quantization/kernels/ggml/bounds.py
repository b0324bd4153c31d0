"""The ends of the codes' values in blocks of ggml's types, and half a gap between them, from the stored scales alone.

data: uint8, whole blocks; low, high, half: float32, an entry for each group of GROUPS weights. The K-quants
take their codes by the scales that are stored. Ternary types take them by a scale before it is rounded to float16: by
2^-11 of itself at most, or 2^-25 where float16 has no normal numbers, in the ends and in what is decoded. See
quantization/grid.py.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.ggml.decode import half_at, six_bits
from loaders.quantization.kernels.lanes import kernel

ROUNDING = np.float32(2.0**-10)  # twice float16's
LEAST = np.float32(2.0**-24)
SMALL = np.float32(2.0**-20)
GROUPS = {
    "MXFP4": 32, "Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16, "TQ1_0": 256, "TQ2_0": 256,
}  # fmt: skip


@kernel
def _largest_bits(data, size, at):  # type: ignore[no-untyped-def]
    """Without their signs, float16s sort as their bits do."""
    top = 0
    for place in range(at, data.size, size):
        bits = np.int64(data[place + 1] & np.uint8(0x7F)) << 8 | np.int64(data[place])
        top = max(top, int(bits))
    return top


def largest_half(data: np.ndarray, size: int, at: int) -> float:
    """The largest magnitude of the float16 at byte `at` of every block of `size` bytes."""
    return float(np.array(_largest_bits(data, size, at), np.uint16).view(np.float16))


@kernel
def _put_exact(g, scale, offset, least, top, low, high, half):  # type: ignore[no-untyped-def]
    """Codes of `least` to `top` by this very scale and offset, in float32."""
    one, other = offset + least * scale, offset + top * scale
    low[g], high[g] = min(one, other), max(one, other)
    half[g] = abs(scale) * (np.float32(0.5) + SMALL * top) + abs(offset) * SMALL


@kernel
def _ternary(data, size, at_scale, low, high, half):  # type: ignore[no-untyped-def]
    for g in range(low.size):
        scale = abs(half_at(data, g * size + at_scale))
        low[g], high[g] = -scale, scale
        half[g] = scale * (np.float32(0.5) + ROUNDING) + LEAST


@kernel
def _mxfp4(data, low, high, half):  # type: ignore[no-untyped-def]
    """Codes' values end at 12; half a gap is 0.5 at zero, and grows as `grid.E2M1_SLOPE` says."""
    for g in range(low.size):
        scale = np.float32(2.0 ** (np.float64(data[g * 17]) - 128.0))
        low[g], high[g] = scale * np.float32(-12), scale * np.float32(12)
        half[g] = scale * np.float32(0.5)


@kernel
def _q2_k(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(low.size // 16):
        d, dmin = half_at(data, b * 84 + 80), half_at(data, b * 84 + 82)
        for j in range(16):
            both = data[b * 84 + j]
            scale, least = d * np.float32(both & 15), dmin * np.float32(both >> 4)
            _put_exact(b * 16 + j, scale, -least, np.float32(0), np.float32(3), low, high, half)


@kernel
def _q3_k(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(low.size // 16):
        at = b * 110
        d = half_at(data, at + 108)
        for j in range(16):
            nibble = (data[at + 96 + j % 8] >> np.uint8(4 * (j // 8))) & np.uint8(15)
            top = (data[at + 104 + j % 4] >> np.uint8(2 * (j // 4))) & np.uint8(3)
            scale = d * np.float32(np.int32(nibble) + 16 * np.int32(top) - 32)
            _put_exact(b * 16 + j, scale, np.float32(0), np.float32(-4), np.float32(3), low, high, half)


@kernel
def _six_bit(data, size, top, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(low.size // 8):
        d, dmin = half_at(data, b * size), half_at(data, b * size + 2)
        for j in range(8):
            s, m = six_bits(data, b * size + 4, j)
            scale, least = d * np.float32(s), dmin * np.float32(m)
            _put_exact(b * 8 + j, scale, -least, np.float32(0), np.float32(top), low, high, half)


@kernel
def _q6_k(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(low.size // 16):
        d = half_at(data, b * 210 + 208)
        for j in range(16):
            scale = d * np.float32(np.int8(data[b * 210 + 192 + j]))
            _put_exact(b * 16 + j, scale, np.float32(0), np.float32(-32), np.float32(31), low, high, half)


TERNARY = {"TQ1_0": (54, 52), "TQ2_0": (66, 64)}
SIX_BIT = {"Q4_K": (144, 15), "Q5_K": (176, 31)}
OTHERS = {"MXFP4": _mxfp4, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q6_K": _q6_k}


def grid(name: str, data: np.ndarray, low: np.ndarray, high: np.ndarray, half: np.ndarray) -> None:
    """Fill in low, high and half for the blocks of a type."""
    if name in TERNARY:
        _ternary(data, *TERNARY[name], low, high, half)
    elif name in SIX_BIT:
        _six_bit(data, *SIX_BIT[name], low, high, half)
    else:
        OTHERS[name](data, low, high, half)
