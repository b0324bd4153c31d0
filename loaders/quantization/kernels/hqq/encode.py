"""HQQ's encoder: groups scaled to integer codes, their zeros moved by a proximal solver.

Source: Mobius Labs, https://mobiusml.github.io/hqq_blog; hqq 0.2.8, hqq/core/quantize.py (Quantizer.quantize) and
optimize.py (optimize_weights_proximal_legacy). For each group of weights, in float32 as on a CPU:
    scale = top * (1 / (max - min)), 1 where max - min <= 1e-4, at most 2e4;  zero = -min * scale, perhaps rounded
and then, up to UPDATES times, over the whole tensor at once:
    code = clamp(round(w * scale + zero), 0, top);  error = w - (code - zero) / scale
    zero = mean(code - (w - shrink(error)) * scale),  shrink(e) = sign(e) * max(|e| - |e|^-0.3 / 10, 0)
The solver stops after the first update whose error was no less than the one before; its zeros are kept all the same.
Errors below 0.17 shrink to nothing, which are all errors of ordinary weights, so the power is computed only where an
error exceeds that.

A vector holds one weight of each of LANES groups, so that a group's sums are taken in its own order whatever lies
beside it. The order is that of torch's sum on a CPU with AVX2 (aten/src/ATen/native/cpu/SumKernel.cpp). It is followed
for groups of up to 256 weights, except, where groups are columns, for the last few if their number is no multiple of
32. In larger groups and in these few, hqq's zeros differ in their last bits. Once no zero of a block changes in an
update, all further updates would repeat themselves and are skipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from loaders.quantization.kernels.compare import float_at
from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, kernel, transpose, vector

LANES = 16  # groups side by side
SHRINKS = np.float32(0.17)  # errors up to this shrink to nothing: |e| > |e|^-0.3 / 10 from 0.1^(1 / 1.3) = 0.1701 on
SMALLEST_RANGE, LARGEST_SCALE = np.float32(1e-4), np.float32(2e4)  # hqq's guards: small ranges, and float16's range
F64 = ir.DoubleType()
WIDE = ir.VectorType(F32, LANES)
ROW, CASCADE = 8, 16  # of torch's sums: floats in an AVX2 vector, and rows that are summed before their sum is added


def _codes(lanes: Lanes, scaled: Value, zero: Value, top: Value) -> Value:
    """Return clamp(round(scaled + zero), 0, top), as float32."""
    kind = scaled.type
    rounded = lanes.call(f"llvm.rint.v{kind.count}f32", kind, lanes.b.fadd(scaled, zero))
    above = lanes.larger(rounded, lanes.const(kind, 0))
    return lanes.b.select(lanes.b.fcmp_ordered("<", above, top), above, top)


# --- a block: float32 (size, LANES), a group in each column


@vector(types.void)
def _copy(lanes: Lanes, x: Array, at: Value, block: Array, to: Value) -> None:
    """Write one weight of each of LANES groups that lie side by side."""
    lanes.store(lanes.floats(x, at, LANES), block, to)


@kernel
def _fill(x, first, by_group, by_weight, groups, size, block):  # type: ignore[no-untyped-def]
    """Fill a block with up to LANES groups; columns without a group are zeros, which add nothing to any sum.

    Weight k of group g is x[g * by_group + k * by_weight].
    """
    start = first * by_group
    if groups < LANES:
        block[:] = 0
        for g in range(groups):
            for k in range(size):
                block[k * LANES + g] = float_at(x, start + g * by_group + k * by_weight)
        return
    if by_group == 1:
        for k in range(size):
            _copy(x, start + k * by_weight, block, k * LANES)
        return
    whole = size // LANES * LANES
    for k in range(0, whole, LANES):
        transpose(x, start + k, by_group, block, k * LANES)
    for k in range(whole, size):
        for g in range(LANES):
            block[k * LANES + g] = float_at(x, start + g * by_group + k)


@vector(types.void)
def _begin(lanes: Lanes, block: Array, size: Value, top: Value, rounds: Value, scale: Array, zero: Array) -> None:
    """Compute the scales and first zeros of a block, and multiply the block by its scales.

    All later steps need weight * scale, and never the weight.
    """
    b, nothing = lanes.b, ir.Constant(size.type, 0)
    first = lanes.load(block, nothing, LANES)
    low, high = variables(lanes, 2)
    b.store(first, low)
    b.store(first, high)
    with cgutils.for_range(b, size) as loop:
        value = lanes.load(block, lanes.op("mul", loop.index, LANES), LANES)
        least, most = b.load(low), b.load(high)
        b.store(b.select(b.fcmp_unordered("<", value, least), value, least), low)
        b.store(b.select(b.fcmp_unordered(">", value, most), value, most), high)
    span = b.fsub(b.load(high), b.load(low))
    is_flat = b.fcmp_ordered("<=", span, lanes.const(WIDE, SMALLEST_RANGE))
    one = lanes.const(WIDE, 1)
    ratio = b.fmul(b.fdiv(one, span), lanes.splat(top, LANES))  # torch divides a number by a tensor in two roundings
    found = b.select(is_flat, one, ratio)
    limit = lanes.const(WIDE, LARGEST_SCALE)
    found = b.select(b.fcmp_ordered(">", found, limit), limit, found)
    begun = b.fneg(b.fmul(b.load(low), found))
    nearest = lanes.call(f"llvm.rint.v{LANES}f32", WIDE, begun)
    is_rounded = b.icmp_unsigned("!=", rounds, ir.Constant(rounds.type, 0))
    lanes.store(found, scale, nothing)
    lanes.store(b.select(is_rounded, nearest, begun), zero, nothing)
    with cgutils.for_range(b, size) as loop:
        at = lanes.op("mul", loop.index, LANES)
        lanes.store(b.fmul(lanes.load(block, at, LANES), found), block, at)


class _Update:
    """One update of a block's zeros where no error shrinks, and the sums of |error| before it.

    With offset = code - weight * scale, the error is (zero - offset) / scale and the new zero the mean of the offsets.
    """

    def __init__(self, lanes: Lanes, block: Array, top: Value, zero: Array, nothing: Value) -> None:
        self.lanes = lanes
        self._block = block
        self._top = lanes.splat(top, LANES)
        self._nothing = nothing
        self._zero = zero
        self._before = lanes.load(zero, nothing, LANES)
        self._away, self._worst = variables(lanes, 2)

    def offset(self, weight: Value) -> Value:
        """Return the offsets of one weight of each group, and note how far they are from the zeros."""
        lanes, b = self.lanes, self.lanes.b
        scaled = lanes.load(self._block, lanes.op("mul", weight, LANES), LANES)
        offset = b.fsub(_codes(lanes, scaled, self._before, self._top), scaled)
        distance = lanes.absolute(b.fsub(self._before, offset))
        b.store(b.fadd(b.load(self._away), distance), self._away)
        b.store(lanes.larger(distance, b.load(self._worst)), self._worst)
        return offset

    def end(self, total: Value, size: Value, scale: Array, error: Array) -> Value:
        """Store the new zeros from the sum of all offsets, and the sums of |error|.

        Returns 0 if no zero changed, 2 if an error exceeds SHRINKS (nothing is stored then), else 1.
        """
        lanes, b = self.lanes, self.lanes.b
        inverse = b.fdiv(lanes.const(WIDE, 1), lanes.load(scale, self._nothing, LANES))
        shrinks = b.fcmp_unordered(">", b.fmul(b.load(self._worst), inverse), lanes.const(WIDE, SHRINKS))
        after = b.fdiv(total, lanes.splat(b.sitofp(size, F32), LANES))
        changes = b.fcmp_unordered("!=", after, self._before)
        bits = ir.IntType(LANES)
        is_any = [b.icmp_unsigned("!=", b.bitcast(each, bits), ir.Constant(bits, 0)) for each in (shrinks, changes)]
        with b.if_then(b.not_(is_any[0])):
            lanes.store(after, self._zero, self._nothing)
            lanes.store(b.fmul(b.load(self._away), inverse), error, self._nothing)
        moved = b.select(is_any[1], ir.Constant(I32, 1), ir.Constant(I32, 0))
        return b.select(is_any[0], ir.Constant(I32, 2), moved)


def variables(lanes: Lanes, count: int) -> list[Any]:
    """Make local variables of a loop, zeros at first; LLVM's mem2reg pass keeps them in registers."""
    made = []
    for _ in range(count):
        variable = cgutils.alloca_once(lanes.b, WIDE)  # type: ignore[no-untyped-call]
        lanes.b.store(lanes.const(WIDE, 0), variable)
        made.append(variable)
    return made


def _add_to(lanes: Lanes, variable: Any, value: Value) -> None:
    """Add a value to a local variable."""
    lanes.b.store(lanes.b.fadd(lanes.b.load(variable), value), variable)


@vector(types.int32)
def _update_columns(
    lanes: Lanes, block: Array, size: Value, top: Value, scale: Array, zero: Array, error: Array
) -> Value:
    """Make an update whose sums are torch's over columns: runs of CASCADE rows, each added to a total when it is full.

    What is left over is summed by itself, and the total is added to it last.
    """
    b, nothing = lanes.b, ir.Constant(size.type, 0)
    update = _Update(lanes, block, top, zero, nothing)
    total, run = variables(lanes, 2)
    runs = b.sdiv(size, ir.Constant(size.type, CASCADE))
    with cgutils.for_range(b, runs) as outer:
        b.store(lanes.const(WIDE, 0), run)
        with cgutils.for_range(b, ir.Constant(size.type, CASCADE)) as inner:
            _add_to(lanes, run, update.offset(b.add(lanes.op("mul", outer.index, CASCADE), inner.index)))
        _add_to(lanes, total, b.load(run))
    b.store(lanes.const(WIDE, 0), run)
    whole = lanes.op("mul", runs, CASCADE)
    with cgutils.for_range(b, b.sub(size, whole)) as rest:
        _add_to(lanes, run, update.offset(b.add(whole, rest.index)))
    return update.end(b.fadd(b.load(run), b.load(total)), size, scale, error)


@vector(types.int32)
def _update_rows(lanes: Lanes, block: Array, size: Value, top: Value, scale: Array, zero: Array, error: Array) -> Value:
    """Make an update whose sums are torch's over rows: vectors of ROW weights go to four sums in turn.

    The four are added, and then the lanes of the vector one after another. Here each of torch's lanes is a pass of its
    own (`across`), since the lanes of this kernel are groups.
    """
    b, nothing = lanes.b, ir.Constant(size.type, 0)
    update = _Update(lanes, block, top, zero, nothing)
    [total] = variables(lanes, 1)
    vectors = b.sdiv(size, ir.Constant(size.type, ROW))
    fours = b.sdiv(vectors, ir.Constant(size.type, 4))
    with cgutils.for_range(b, ir.Constant(size.type, ROW)) as across:
        sums = variables(lanes, 4)
        with cgutils.for_range(b, fours) as each:
            for part, variable in enumerate(sums):
                at = lanes.op("mul", lanes.op("add", lanes.op("mul", each.index, 4), part), ROW)
                _add_to(lanes, variable, update.offset(b.add(at, across.index)))
        begun = lanes.op("mul", fours, 4)
        with cgutils.for_range(b, b.sub(vectors, begun)) as rest:
            at = lanes.op("mul", b.add(begun, rest.index), ROW)
            _add_to(lanes, sums[0], update.offset(b.add(at, across.index)))
        for variable in sums:
            if variable is not sums[0]:
                _add_to(lanes, sums[0], b.load(variable))
        _add_to(lanes, total, b.load(sums[0]))
    return update.end(b.load(total), size, scale, error)


@kernel
def _update_slowly(block, size, top, scale, zero, error):  # type: ignore[no-untyped-def]
    """Make an update of a block in which errors shrink, one group after another; return whether a zero changed."""
    changes = False
    for lane in range(LANES):
        before, inverse = zero[lane], np.float32(1) / scale[lane]
        total, away = np.float32(0), np.float32(0)
        for k in range(size):
            scaled = block[k * LANES + lane]
            code = min(max(np.rint(scaled + before), np.float32(0)), top)
            offset = code - scaled
            distance = (before - offset) * inverse
            magnitude = abs(distance)
            shrunk = np.float32(0)
            if magnitude > SHRINKS:
                shrunk = max(magnitude - np.float32(0.1) * magnitude ** np.float32(-0.3), np.float32(0))
            total += offset + np.copysign(shrunk, distance) * scale[lane]
            away += magnitude
        after = np.float32(total / np.float32(size))
        changes = changes or after != before
        zero[lane] = after
        error[lane] = away
    return changes


@vector(types.void)
def _add(lanes: Lanes, error: Array, sums: Array, at: Value) -> None:
    """Add a block's errors to LANES float64 sums."""
    wide = lanes.b.fpext(lanes.load(error, ir.Constant(at.type, 0), LANES), ir.VectorType(F64, LANES))
    lanes.store(lanes.b.fadd(lanes.load(sums, at, LANES), wide), sums, at)


@kernel
def solve(x, by_group, by_weight, size, top, rounds, updates, scales, zeros, errors):  # type: ignore[no-untyped-def]
    """Find scales and zeros of groups by a fixed number of updates.

    Weight k of group g is x[g * by_group + k * by_weight]; one of the two strides is 1. `rounds` says whether the first
    zero is rounded. scales, zeros: float32 (groups,); errors: float64 (updates,), to which the sum of |error| before
    each update is added, in an order that depends on the number of groups alone.
    """
    block = np.empty(size * LANES, np.float32)
    scale, zero, error = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    sums = np.zeros(updates * LANES, np.float64)
    for first in range(0, scales.size, LANES):
        groups = min(LANES, scales.size - first)
        _fill(x, first, by_group, by_weight, groups, size, block)
        _begin(block, size, top, np.int32(rounds), scale, zero)
        moves = True  # once no zero of the block moves, the errors of all further updates are the same
        for i in range(updates):
            if moves:
                if by_group == 1:
                    found = _update_columns(block, size, top, scale, zero, error)
                else:
                    found = _update_rows(block, size, top, scale, zero, error)
                moves = found == 1 if found < 2 else _update_slowly(block, size, top, scale, zero, error)
            _add(error, sums, i * LANES)
        for g in range(groups):
            scales[first + g] = scale[g]
            zeros[first + g] = zero[g]
    for i in range(updates):
        for lane in range(LANES):
            errors[i] += sums[i * LANES + lane]


# --- codes


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
    codes = _codes(lanes, scaled, lanes.splat(zero, count), lanes.splat(top, count))
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


@kernel
def code_rows(x, size, scales, zeros, top, shift, out):  # type: ignore[no-untyped-def]
    """Code groups that lie one after another, into the bits from `shift` on. x: (n,); out: uint8 or int32 (n,)."""
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
    codes = _codes(lanes, scaled, lanes.load(zeros, g, count), lanes.splat(top, count))
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
def code_column(x, scales, zeros, top, shift, out):  # type: ignore[no-untyped-def]
    """Code one weight of each group, into the bits from `shift` on. All arrays: (groups,); out: uint8 or int32."""
    whole = out.size // 16 * 16
    for g in range(0, whole, 16):
        _code_across_16(x, g, scales, zeros, top, shift, out)
    for g in range(whole, out.size):
        _code_across_1(x, g, scales, zeros, top, shift, out)
