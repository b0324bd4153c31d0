"""The grids of ggml's types: the ends of the codes' values and half a gap between them, from the stored scales alone.

data: uint8, whole blocks; low, high, half: float32, an entry for each group of GROUPS[type] weights. The K-quants find
their codes by the scales as they are stored, so only float32 rounds. The ternary types find them by a scale before it
is rounded to float16, which moves it by at most 2^-11 of itself, or 2^-25 below float16's normal numbers; that counts
twice, in the ends and in the decoded values. See quantization/grid.py.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.ggml.decode import half_at, six_bits
from loaders.quantization.kernels.lanes import I16, Array, Lanes, Value, kernel, vector

ROUNDING = np.float32(2.0**-10)  # twice float16's greatest relative rounding
LEAST = np.float32(2.0**-24)  # twice its greatest absolute rounding, below its normal numbers
SMALL = np.float32(2.0**-20)  # room for sixteen float32 roundings, relative
# weights that share a grid: a sub-block of the K-quants, else a block
GROUPS = {
    "MXFP4": 32, "Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16, "TQ1_0": 256, "TQ2_0": 256,
}  # fmt: skip


@vector(types.int64)
def _magnitude_bits(lanes: Lanes, data: Array, at: Value) -> Value:
    """Return the bits, without the sign, of the float16 at byte `at`."""
    bits = lanes.b.bitcast(lanes.load(data, at, 2), I16)
    return lanes.b.zext(lanes.op("and_", bits, 0x7FFF), ir.IntType(64))


@kernel
def _largest_bits(data, size, at):  # type: ignore[no-untyped-def]
    """Find the greatest bits, without signs, of the float16s at byte `at` of every block: they sort as magnitudes.

    Four are found side by side, since each comparison waits for the one before it.
    """
    a, b, c, d, whole = 0, 0, 0, 0, data.size // (4 * size) * (4 * size)
    for place in range(at, whole, 4 * size):
        a = max(a, _magnitude_bits(data, place))
        b = max(b, _magnitude_bits(data, place + size))
        c = max(c, _magnitude_bits(data, place + 2 * size))
        d = max(d, _magnitude_bits(data, place + 3 * size))
    for place in range(whole + at, data.size, size):
        a = max(a, _magnitude_bits(data, place))
    return max(a, b, c, d)


def largest_half(data: np.ndarray, size: int, at: int) -> float:
    """Return the largest magnitude among the float16s at byte `at` of every block of `size` bytes."""
    return float(np.array(_largest_bits(data, size, at), np.uint16).view(np.float16))


@kernel
def _put_exact(g, scale, offset, least, top, low, high, half):  # type: ignore[no-untyped-def]
    """Put the grid of group g, whose codes from `least` to `top` were found by exactly this scale and offset."""
    one, other = offset + least * scale, offset + top * scale
    low[g], high[g] = min(one, other), max(one, other)
    half[g] = abs(scale) * (np.float32(0.5) + SMALL * top) + abs(offset) * SMALL


def of_ternary(lanes: Lanes, data: Array, at: Value) -> tuple[Value, Value]:
    """Return the greatest value, the block's scale at a byte, and half a gap, half a scale, in sixteen equal lanes."""
    bits = lanes.b.bitcast(lanes.load(data, at, 2), I16)
    scale = lanes.absolute(lanes.from_f16(lanes.splat(bits, 16)))
    return scale, lanes.op("fadd", lanes.op("fmul", scale, 0.5 + float(ROUNDING)), float(LEAST))


@vector(types.void)
def _put_ternary(lanes: Lanes, data: Array, at: Value, g: Value, low: Array, high: Array, half: Array) -> None:
    scale, gap = of_ternary(lanes, data, at)
    for each, value in ((low, lanes.b.fneg(scale)), (high, scale), (half, gap)):
        lanes.store(lanes.part(value, 0, 1), each, g)


@kernel
def _ternary(data, size, at_scale, low, high, half):  # type: ignore[no-untyped-def]
    """Codes are -1, 0 and 1 times the block's scale."""
    for g in range(low.size):
        _put_ternary(data, g * size + at_scale, g, low, high, half)


@kernel
def _mxfp4(data, low, high, half):  # type: ignore[no-untyped-def]
    """Code values are doubled E2M1 times a halved scale, as in ggml: they end at 12, and half a gap is 0.5 at zero.

    It grows with a value as `grid.E2M1_SLOPE` says, which the scheme adds.
    """
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


TERNARY = {"TQ1_0": (54, 52), "TQ2_0": (66, 64)}  # bytes of a block, the byte of its scale
SIX_BIT = {"Q4_K": (144, 15), "Q5_K": (176, 31)}  # bytes of a block, the greatest code
OTHERS = {"MXFP4": _mxfp4, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q6_K": _q6_k}


def grid(name: str, data: np.ndarray, low: np.ndarray, high: np.ndarray, half: np.ndarray) -> None:
    """Fill in low, high and half for whole blocks of the type `name`, one of GROUPS."""
    if name in TERNARY:
        _ternary(data, *TERNARY[name], low, high, half)
    elif name in SIX_BIT:
        _six_bit(data, *SIX_BIT[name], low, high, half)
    else:
        OTHERS[name](data, low, high, half)
