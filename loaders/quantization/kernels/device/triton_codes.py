"""Triton's source of what torch would do in a dozen kernels: NF4's and FP4's codes, and the sums of errors.

The arithmetic is that of fourbit.py, decode.py and compare.py, operation by operation; only sums have another order.
`device/triton_launch.py` starts these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A kernel sees only such globals.
SMALLEST = tl.constexpr(1e-38)  # no largest magnitude is taken for less, so that its inverse is finite


@triton.jit
def _rank(scaled, bounds):
    """Return how many of the fifteen bounds lie below each number, all for a NaN."""
    rank = tl.zeros_like(scaled).to(tl.int32)
    for i in tl.static_range(15):
        rank += tl.where(scaled <= tl.load(bounds + i), 0, 1)
    return rank


@triton.jit
def _within_one(v):
    return tl.where(v < -1.0, -1.0, tl.where(v > 1.0, 1.0, v))


@triton.jit
def encode_fourbit(
    x, bounds, order, packed, largest, groups, HALF: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Code ROWS groups of 2 * HALF weights a program. x: any float dtype; packed: uint8, the first code high."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start, inside = row.to(tl.int64)[:, None], (row < groups)[:, None]
    w = tl.load(x + start * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :], mask=inside, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(w, (ROWS, HALF, 2)))
    top = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
    # A largest magnitude drops a NaN, which must reach the scale.
    has_nan = tl.max(tl.where((first == first) & (second == second), 0, 1), axis=1) > 0
    top = tl.where(has_nan, float("nan"), top)
    inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.where(top < SMALLEST, SMALLEST, top))[:, None]
    high = tl.load(order + _rank(_within_one(first * inverse), bounds))
    low = tl.load(order + _rank(_within_one(second * inverse), bounds))
    tl.store(packed + start * HALF + tl.arange(0, HALF)[None, :], low | (high << 4), mask=inside)
    tl.store(largest + row, top, mask=row < groups)


@triton.jit
def decode_fourbit(packed, largest, values, out, count, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Decode BLOCK bytes a program: out is float32 (2 * count,), values those of the sixteen codes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(largest + at // HALF, mask=inside, other=0.0)
    high, low = tl.load(values + (byte >> 4)) * scale, tl.load(values + (byte & 15)) * scale
    both = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out + both, tl.interleave(high, low), mask=both < 2 * count)


@triton.jit
def add_pairs(source, decoded, sums, count, PROGRAMS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the differences of STEPS * BLOCK pairs a program. source: any float dtype; sums: float64 (5, PROGRAMS)."""
    program = tl.program_id(0)
    none = tl.zeros((BLOCK,), tl.float64)
    error2, source2, decoded2, product, most = none, none, none, none, none
    for step in range(STEPS):
        at = (program.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < count, other=0.0).to(tl.float64)
        y = tl.load(decoded + at, mask=at < count, other=0.0).to(tl.float64)
        error = x - y
        error2 += error * error
        source2 += x * x
        decoded2 += y * y
        product += x * y
        most = tl.maximum(most, tl.abs(error))
    tl.store(sums + program, tl.sum(error2))
    tl.store(sums + PROGRAMS + program, tl.sum(source2))
    tl.store(sums + 2 * PROGRAMS + program, tl.sum(decoded2))
    tl.store(sums + 3 * PROGRAMS + program, tl.sum(product))
    tl.store(sums + 4 * PROGRAMS + program, tl.max(most))
