"""Triton's source of the kernels of triton_search.py. Arrays are pointers to float32, unless said otherwise."""

from __future__ import annotations

import triton
import triton.language as tl

from loaders.quantization.kernels.device.hqq import LARGEST_SCALE, SMALLEST_RANGE

# A kernel sees only such globals.
NEAR = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it and taking it away leaves the nearest integer
SHRINKS = tl.constexpr(0.17)  # errors up to this shrink to nothing: see kernels/hqq/update.py
LEAST_RANGE, MOST_SCALE = tl.constexpr(SMALLEST_RANGE), tl.constexpr(LARGEST_SCALE)


@triton.jit
def _nearest(v, least, most):
    """Return the nearest integer within bounds; a NaN becomes the least."""
    nearest = (v + NEAR) - NEAR
    above = tl.where(nearest > least, nearest, least)
    return tl.where(above < most, above, most)


@triton.jit
def _finite(step):
    return tl.where(tl.abs(step) == float("inf"), 0.0, step)


@triton.jit
def solve_hqq(
    groups, scales, zeros, moved, errors, count, size, top, updates,
    ROUNDS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Find scales and zeros of ROWS groups a program. groups: (count, size); moved: uint8 (count,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    is_row, is_weight = row < count, (row < count)[:, None] & (column < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    w = tl.load(groups + at, mask=is_weight, other=0.0)
    low = tl.min(tl.where(is_weight, w, float("inf")), axis=1)
    high = tl.max(tl.where(is_weight, w, float("-inf")), axis=1)
    span = high - low
    scale = tl.where(span <= LEAST_RANGE, 1.0, top * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), span))
    scale = tl.where(scale > MOST_SCALE, MOST_SCALE, scale)
    # The bounds of a comparison drop a NaN, which must reach the errors.
    bad = tl.sum(w - w, axis=1)
    scale = tl.where(is_row, scale, 1.0)
    zero = -low * scale
    if ROUNDS:
        zero = (zero + NEAR) - NEAR
    scaled, inverse = w * scale[:, None], tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)
    last = tl.zeros((ROWS,), tl.int32)
    for i in range(updates):
        codes = _nearest(scaled + zero[:, None], 0.0, top)
        offset = codes - scaled
        error = (zero[:, None] - offset) * inverse[:, None]
        away = tl.where(is_weight, tl.abs(error), 0.0)
        if tl.max(tl.max(away, axis=1), axis=0) > SHRINKS:
            shrunk = tl.maximum(away - 0.1 * tl.exp2(-0.3 * tl.log2(tl.maximum(away, SHRINKS))), 0.0)
            shrunk = tl.where(away > SHRINKS, shrunk, 0.0)
            offset += tl.where(error < 0, -shrunk, shrunk) * scale[:, None]
        found = tl.sum(tl.where(is_weight, offset, 0.0), axis=1) / size
        tl.store(errors + row.to(tl.int64) * updates + i, tl.sum(away, axis=1) + bad, mask=is_row)
        last = tl.where(found != zero, i + 1, last)
        zero = found
    tl.store(scales + row, scale, mask=is_row)
    tl.store(zeros + row, zero, mask=is_row)
    tl.store(moved + row, last.to(tl.uint8), mask=is_row)


@triton.jit
def _line_misfit(x, at, inside, count, mean, step, start, scale, low, top, N: tl.constexpr, BY_SQUARE: tl.constexpr):
    """Return the misfit of a line to the codes that `step` and `start` give."""
    total = tl.zeros_like(scale)
    for i in range(N):
        v = tl.load(x + i * count + at, mask=inside, other=0.0)
        code = _nearest(step * (v - start), 0.0, top)
        missed = (scale * code + low) - v
        missed = missed * missed if BY_SQUARE else tl.abs(missed)
        total += (mean + tl.abs(v)) * missed
    return total


@triton.jit
def search_line(
    x, reaches, scales, lows, codes, count, top, tries,
    N: tl.constexpr, BY_SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Search the lines of BLOCK sub-blocks a program. x, codes: (N, count); reaches: (tries,)."""
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = at < count
    none = tl.zeros((BLOCK,), tl.float32)
    mean, tops = none, none + top
    if BY_SQUARE:
        squares = none
        for i in range(N):
            v = tl.load(x + i * count + at, mask=inside, other=0.0)
            squares += v * v
        mean = tl.sqrt_rn(tl.div_rn(squares, none + N))
    v = tl.load(x + at, mask=inside, other=0.0)
    low, high, sum_w = v, v, mean + tl.abs(v)
    sum_x = sum_w * v
    for i in range(1, N):
        v = tl.load(x + i * count + at, mask=inside, other=0.0)
        w = mean + tl.abs(v)
        low, high = tl.where(v < low, v, low), tl.where(high < v, v, high)
        sum_w += w
        sum_x += w * v
    low = tl.where(low > 0, 0.0, low)
    first_low = low
    step = tl.div_rn(tops, high - low)
    scale, step = tl.div_rn(none + 1.0, step), _finite(step)
    misfit = _line_misfit(x, at, inside, count, mean, step, low, scale, low, top, N, BY_SQUARE)
    best_step, start = step, low
    for k in range(tries):
        step = _finite(tl.div_rn(none + tl.load(reaches + k), high - low))
        sum_l, sum_l2, sum_xl = none, none, none
        for i in range(N):
            v = tl.load(x + i * count + at, mask=inside, other=0.0)
            code = _nearest(step * (v - low), 0.0, top)
            weighted = (mean + tl.abs(v)) * code
            sum_l += weighted
            sum_l2 += weighted * code
            sum_xl += weighted * v
        d = sum_w * sum_l2 - sum_l * sum_l
        new_scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, d)
        least = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, d)
        is_above = least > 0
        new_scale = tl.where(is_above, tl.div_rn(sum_xl, sum_l2), new_scale)
        least = tl.where(is_above, 0.0, least)
        found = _line_misfit(x, at, inside, count, mean, step, low, new_scale, least, top, N, BY_SQUARE)
        is_better = (d > 0) & (found < misfit)
        best_step, start = tl.where(is_better, step, best_step), tl.where(is_better, low, start)
        scale, low = tl.where(is_better, new_scale, scale), tl.where(is_better, least, low)
        misfit = tl.where(is_better, found, misfit)
    is_flat = high == first_low
    best_step = tl.where(is_flat, 0.0, best_step)
    for i in range(N):
        v = tl.load(x + i * count + at, mask=inside, other=0.0)
        tl.store(codes + i * count + at, _nearest(best_step * (v - start), 0.0, top), mask=inside)
    tl.store(scales + at, tl.where(is_flat, 0.0, scale), mask=inside)
    tl.store(lows + at, tl.where(is_flat, first_low, low), mask=inside)


@triton.jit
def _scale_fit(x, at, inside, count, step, N: tl.constexpr):
    """Return the sums of x^2 * x * code and of x^2 * code * code."""
    sum_lx, sum_l2 = tl.zeros_like(step), tl.zeros_like(step)
    for i in range(N):
        v = tl.load(x + i * count + at, mask=inside, other=0.0)
        square, code = v * v, _nearest(step * v, -32.0, 31.0)
        sum_lx += (square * v) * code
        sum_l2 += (square * code) * code
    return sum_lx, sum_l2


@triton.jit
def search_scale(x, top, reaches, scales, steps, count, tries, N: tl.constexpr, BLOCK: tl.constexpr):
    """Search the scales of BLOCK sub-blocks a program. x: (N, count); top, scales, steps: (count,)."""
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = at < count
    none = tl.zeros((BLOCK,), tl.float32)
    tops = tl.load(top + at, mask=inside, other=1.0)
    best_step = tl.div_rn(none - 32.0, tops)
    sum_lx, sum_l2 = _scale_fit(x, at, inside, count, best_step, N)
    scale = tl.where(sum_l2 != 0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    for k in range(tries):
        step = tl.div_rn(none - tl.load(reaches + k), tops)
        sum_lx, sum_l2 = _scale_fit(x, at, inside, count, step, N)
        is_better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        found = tl.div_rn(sum_lx, sum_l2)
        scale, best_step = tl.where(is_better, found, scale), tl.where(is_better, step, best_step)
        best = tl.where(is_better, found * sum_lx, best)
    tl.store(scales + at, scale, mask=inside)
    tl.store(steps + at, best_step, mask=inside)
