"""The grids of ggml's types: the ends of the codes' values and half a gap between them, from the stored scales alone.

data: uint8, whole blocks; low, high, half: float32, an entry for each group of GROUPS[type] weights. The K-quants find
their codes by the scales as they are stored, so only float32 rounds. The ternary types find them by a scale before it
is rounded to float16, which moves it by at most 2^-11 of itself, or 2^-25 below float16's normal numbers; that counts
twice, in the ends and in the decoded values. See quantization/grid.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.ggml import super_blocks
from loaders.quantization.kernels.ggml.iq4_decode import half_at, iq4_xs_scale
from loaders.quantization.kernels.ggml.super_blocks import Scales, SuperBlock
from loaders.quantization.kernels.lanes import I16, Array, Lanes, Value, kernel, vector

ROUNDING = np.float32(2.0**-10)  # twice float16's greatest relative rounding
LEAST = np.float32(2.0**-24)  # twice its greatest absolute rounding, below its normal numbers
SMALL = np.float32(2.0**-20)  # room for sixteen float32 roundings, relative
# weights that share a grid: a sub-block of the K-quants, else a block
GROUPS = {
    "MXFP4": 32, "Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16, "TQ1_0": 256, "TQ2_0": 256,
    "IQ4_NL": 32, "IQ4_XS": 32,
}  # fmt: skip
TERNARY = super_blocks.TQ1_0, super_blocks.TQ2_0


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


Bounds = tuple[Value, Value, Value]  # low, high and half of sub-blocks, float32 lanes


def bounds_of(lanes: Lanes, block: SuperBlock, scales: Scales) -> Bounds:
    """Return the grids of a super-block's sub-blocks, in as many lanes as its scales have."""
    scale, minimum = scales
    size = lanes.absolute(scale)
    if block in TERNARY:
        return lanes.b.fneg(size), size, lanes.op("fadd", lanes.op("fmul", size, float(0.5 + ROUNDING)), float(LEAST))
    offset = lanes.const(scale.type, 0) if minimum is None else lanes.b.fneg(minimum)
    one, other = (lanes.b.fadd(offset, lanes.op("fmul", scale, code)) for code in (block.least, block.top))
    low = lanes.b.select(lanes.b.fcmp_ordered("<", other, one), other, one)
    half = lanes.op("fmul", size, float(np.float32(0.5) + SMALL * np.float32(block.top)))
    return low, lanes.larger(other, one), lanes.b.fadd(half, lanes.op("fmul", lanes.absolute(offset), float(SMALL)))


def _putter(block: SuperBlock, group: int) -> Callable[..., None]:
    """Return what stores the grids of the super-block at byte `at`, of `group` weights each, from entry `to` on."""
    count = super_blocks.SUPER // group

    @vector(types.void)
    def put(lanes: Lanes, data: Array, at: Value, low: Array, high: Array, half: Array, to: Value) -> None:
        found = bounds_of(lanes, block, block.scales(lanes, data, at))
        for bounds, out in zip(found, (low, high, half), strict=True):
            lanes.store(lanes.part(bounds, 0, count), out, to)

    return put  # type: ignore[no-any-return]


_put_q2_k, _put_q3_k = _putter(super_blocks.Q2_K, 16), _putter(super_blocks.Q3_K, 16)
_put_q4_k, _put_q5_k = _putter(super_blocks.Q4_K, 32), _putter(super_blocks.Q5_K, 32)
_put_q6_k = _putter(super_blocks.Q6_K, 16)
_put_tq1_0, _put_tq2_0 = (_putter(block, 256) for block in TERNARY)


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
def _put_levels(scale, floor, low, high, half, g):  # type: ignore[no-untyped-def]
    """Store the grid of a group of IQ4_NL or IQ4_XS, whose levels end at -127 and 113.

    Half a gap is 6 at zero, and grows with a value as schemes.ggml.LEVELS_SLOPE says, which the scheme adds. Codes are
    found by a scale before it is rounded, which moves the greatest code by 127 times `floor`, or 2^-11 of itself.
    """
    one, other = scale * np.float32(-127), scale * np.float32(113)
    low[g], high[g] = min(one, other), max(one, other)
    half[g] = abs(scale) * np.float32(6 + 127 * 2.0**-10) + np.float32(2 * 127) * floor


@kernel
def _iq4_nl(data, low, high, half):  # type: ignore[no-untyped-def]
    for g in range(low.size):
        _put_levels(half_at(data, g * 18), np.float32(2.0**-25), low, high, half, g)


@kernel
def _iq4_xs(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(data.size // 136):
        for j in range(8):
            factor = iq4_xs_scale(data, b * 136, j)
            scale = half_at(data, b * 136) * factor
            _put_levels(scale, abs(factor) * np.float32(2.0**-25), low, high, half, b * 8 + j)


@kernel
def _q2_k(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(data.size // 84):
        _put_q2_k(data, b * 84, low, high, half, b * 16)


@kernel
def _q3_k(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(data.size // 110):
        _put_q3_k(data, b * 110, low, high, half, b * 16)


@kernel
def _q4_k(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(data.size // 144):
        _put_q4_k(data, b * 144, low, high, half, b * 8)


@kernel
def _q5_k(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(data.size // 176):
        _put_q5_k(data, b * 176, low, high, half, b * 8)


@kernel
def _q6_k(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(data.size // 210):
        _put_q6_k(data, b * 210, low, high, half, b * 16)


@kernel
def _tq1_0(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(data.size // 54):
        _put_tq1_0(data, b * 54, low, high, half, b)


@kernel
def _tq2_0(data, low, high, half):  # type: ignore[no-untyped-def]
    for b in range(data.size // 66):
        _put_tq2_0(data, b * 66, low, high, half, b)


FILLERS = {
    "MXFP4": _mxfp4, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip


def grid(name: str, data: np.ndarray, low: np.ndarray, high: np.ndarray, half: np.ndarray) -> None:
    """Fill in low, high and half for whole blocks of the type `name`, one of GROUPS."""
    FILLERS[name](data, low, high, half)
