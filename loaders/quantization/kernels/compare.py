"""Sums of the error of decoded weights, which add up over ranges, tensors and machines.

Sums are taken in float32 lanes and moved to float64 every CHUNK weights. They are those of x^2, e^2 and x e, for the
source x and the error e = x - y. What a report needs of the decoded y follows from them: y^2 = x^2 - 2 x e + e^2 and
x y = x^2 - x e, which cancels nothing where e is small. A chunk is summed again in float64, weight by weight over its
finite pairs, where e is not small, where squares leave float32's range, or where it holds a NaN or an infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F32, I32, Array, Lanes, Value, host_has, kernel, vector
from loaders.stats import ErrorSums

# Weights summed in float32 before the sums move to float64: 256 additions a lane, each of which rounds by up to 2^-24.
# A longer chunk loses digits; a shorter one spends more of its time on moving sums. As float32 they are 16 KiB, which
# stay in a core's first cache from decoding to comparing.
CHUNK = 4096
LANES = 16  # float32 sums side by side
F64 = ir.DoubleType()
# the slots of `sums`
ERROR2, SOURCE2, DECODED2, PRODUCT, MAX_ERROR, NONFINITE, NONFINITE_DECODED, WRONG, SLOTS = range(9)
# If the decoded weights' sum of squares is less than this share of the source's, it comes from a difference of large
# sums and has lost too many digits.
LEAST_DECODED = 0.1
# The sums of squares of a chunk for which float32 is trusted: far enough from its ends (1e-38 and 3e38) that no square
# that matters has underflowed and none has overflowed.
TRUSTED = (np.float32(1e-25), np.float32(1e30))


Group = tuple[Value, ...]  # what a group's weights are decoded by, such as its scale in every lane


def add_groups(
    lanes: Lanes,
    x: Array,
    start: Value,
    stop: Value,
    group: Value,
    totals: Array,
    of_group: Callable[[Value], Group],
    decoded: Callable[[Value, Group], Sequence[Value]],
    is_off: Callable[[Value, Value, Group], Value] | None = None,
    in_order: int = 0,
    of_part: Callable[[Group, int], Group] = lambda own, part: own,
) -> Value:
    """Do as `_add` does for weights that are decoded into registers: whole groups, of a multiple of 2 * LANES.

    `of_group` takes a group's number; `decoded` returns the 2 * LANES weights from a place on, those at even places and
    those at odd ones, as `lanes.pairs` does. With `in_order`, a multiple of LANES that divides groups, it returns as
    many weights as they lie, and sums are to the last bit those of `compare`. `is_off` tells of LANES sources and
    decoded values which are further apart than their group allows, or than `of_part` says of a group and the number of
    a vector of `decoded`; `totals` gets a 1 in its fourth entry if one is, else a 0.
    """
    state, off = _nothing(lanes, _kept_lanes()), lanes.const(ir.VectorType(ir.IntType(1), LANES), 0)

    def sources(at: Value) -> Sequence[Value]:
        if not in_order:
            return lanes.pairs(x, at, 2 * LANES)
        return [lanes.floats(x, lanes.op("add", at, first), LANES) for first in range(0, in_order, LANES)]

    def add_group(at: Value, *found: Value) -> list[Value]:
        own = of_group(lanes.b.udiv(at, group))

        def add(at: Value, *found: Value) -> list[Value]:
            *state, off = found
            for part, (source, value) in enumerate(zip(sources(at), decoded(at, own), strict=True)):
                state = _with(lanes, source, lanes.b.fsub(source, value), state)
                off = lanes.b.or_(off, is_off(source, value, of_part(own, part))) if is_off else off
            return [*state, off]

        return lanes.fold(at, lanes.b.add(at, group), in_order or 2 * LANES, found, add)

    *state, off = _by(lanes, start, stop, group, [*state, off], add_group)
    if is_off:
        found = lanes.b.uitofp(lanes.reduce("or", off), F64)
        lanes.b.store(found, lanes.b.gep(totals.data, [ir.Constant(I32, 3)]))
    return _stored(lanes, state, totals)


def _by(
    lanes: Lanes, start: Value, stop: Value, step: Value, values: Sequence[Value], body: Callable[..., Sequence[Value]]
) -> list[Value]:
    """Do as `lanes.fold` does, by a step that is known only when the kernel runs."""
    count = lanes.b.udiv(lanes.b.sub(stop, start), step)

    def turn(index: Value, *found: Value) -> Sequence[Value]:
        return body(lanes.b.add(start, lanes.b.mul(index, step)), *found)

    return lanes.fold(ir.Constant(start.type, 0), count, 1, values, turn)


def _kept_lanes() -> int:
    """Return in how many lanes the largest error is kept: where registers are few, half, which leaves them to sums."""
    return LANES if host_has("avx512f") else LANES // 2


def _nothing(lanes: Lanes, kept: int) -> list[Value]:
    """Return the sums of no pairs: of e^2, x^2 and x e, and the largest |e| in `kept` lanes."""
    nothing = lanes.const(ir.VectorType(F32, LANES), 0)
    return [nothing, nothing, nothing, lanes.part(nothing, 0, kept)]


def _with(lanes: Lanes, source: Value, error: Value, found: Sequence[Value]) -> list[Value]:
    """Return the sums `found` with those of LANES more weights."""
    pairs = ((error, error), (source, source), (source, error))
    sums = [lanes.b.fadd(total, lanes.b.fmul(a, b)) for total, (a, b) in zip(found[:3], pairs, strict=True)]
    size, kept = lanes.absolute(error), found[3].type.count
    if kept < LANES:
        size = lanes.larger(lanes.part(size, 0, kept), lanes.part(size, 1, kept))
    return [*sums, lanes.larger(size, found[3])]


def _stored(lanes: Lanes, found: Sequence[Value], totals: Array) -> Value:
    """Put the sums `found` into `totals`, and return the largest |e|."""
    *sums, largest = found
    for slot, each in enumerate(sums):
        lanes.b.store(_whole(lanes, each), lanes.b.gep(totals.data, [ir.Constant(I32, slot)]))
    while (width := largest.type.count // 2) > 0:
        largest = lanes.larger(lanes.part(largest, 0, width), lanes.part(largest, 1, width))
    return lanes.b.fpext(lanes.b.extract_element(largest, ir.Constant(I32, 0)), F64)


def _whole(lanes: Lanes, sums: Value) -> Value:
    """Add float32 lanes in float64, half to half: an order that does not depend on the machine's vector width."""
    wide = lanes.b.fpext(sums, ir.VectorType(F64, LANES))
    while (width := wide.type.count // 2) > 0:
        wide = lanes.b.fadd(lanes.part(wide, 0, width), lanes.part(wide, 1, width))
    return lanes.b.extract_element(wide, ir.Constant(I32, 0))


@vector(types.float64)
def _add(lanes: Lanes, x: Array, y: Array, start: Value, stop: Value, totals: Array) -> Value:
    """Put the sums of e^2, x^2 and x e over pairs [start, stop) into `totals`; return the largest |e|.

    The number of pairs is a multiple of LANES.
    """

    def add(at: Value, *found: Value) -> list[Value]:
        source = lanes.floats(x, at, LANES)
        return _with(lanes, source, lanes.b.fsub(source, lanes.floats(y, at, LANES)), found)

    return _stored(lanes, lanes.fold(start, stop, LANES, _nothing(lanes, _kept_lanes()), add), totals)


@vector(types.float32)
def float_at(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return one raw weight as float32."""
    return lanes.b.extract_element(lanes.floats(x, at, 1), ir.Constant(I32, 0))


@vector(types.float64)
def _add_squares(lanes: Lanes, x: Array, start: Value, stop: Value) -> Value:
    """Return the sum of the squares of weights [start, stop), whose number is a multiple of LANES."""

    def add(at: Value, total: Value) -> list[Value]:
        values = lanes.floats(x, at, LANES)
        return [lanes.b.fadd(total, lanes.b.fmul(values, values))]

    [total] = lanes.fold(start, stop, LANES, [lanes.const(ir.VectorType(F32, LANES), 0)], add)
    return _whole(lanes, total)


@kernel
def settle(largest, totals, sums):  # type: ignore[no-untyped-def]
    """Add the float32 sums of a chunk, in `totals`, and its largest |e| to `sums`; False if they are not trusted."""
    errors, source, crossed = totals[0], totals[1], totals[2]
    decoded = source - 2 * crossed + errors
    # A NaN or an infinity makes a sum NaN or infinite, so that these comparisons refuse the chunk.
    is_trusted = TRUSTED[0] < source < TRUSTED[1] and LEAST_DECODED * source < decoded < TRUSTED[1]
    # The largest |e| passes over a NaN, which zeros may be decoded to; the sum of e^2 does not.
    if not (is_trusted or (source == 0 and errors == 0 and largest == 0)):
        return False
    sums[ERROR2] += errors
    sums[SOURCE2] += source
    sums[DECODED2] += decoded
    sums[PRODUCT] += source - crossed
    sums[MAX_ERROR] = max(sums[MAX_ERROR], largest)
    return True


@kernel
def add_slowly(x, y, start, stop, sums):  # type: ignore[no-untyped-def]
    """Add finite pairs [start, stop) to `sums` in float64, and count the others."""
    for i in range(start, stop):
        a, b = np.float64(float_at(x, i)), np.float64(float_at(y, i))
        if not np.isfinite(a):
            sums[NONFINITE] += 1
        elif not np.isfinite(b):
            sums[NONFINITE_DECODED] += 1
        else:
            error = a - b
            sums[ERROR2] += error * error
            sums[SOURCE2] += a * a
            sums[DECODED2] += b * b
            sums[PRODUCT] += a * b
            sums[MAX_ERROR] = max(sums[MAX_ERROR], abs(error))


@kernel
def tile_size(group):  # type: ignore[no-untyped-def]
    """Return the number of weights that are decoded before they are compared: whole groups, CHUNK or a little less.

    A longer group is a tile of its own.
    """
    return max(1, CHUNK // group) * group


@kernel
def compare(x, y, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x and y to `sums`. x, y: raw weights (n,), each of its dtype; sums: float64 (SLOTS,)."""
    add_pairs(x, y, np.zeros(3, np.float64), sums)


@kernel
def add_pairs(x, y, totals, sums):  # type: ignore[no-untyped-def]
    """Do as `compare` does, with room for three float64 in `totals`."""
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        whole = start + (stop - start) // LANES * LANES
        if not settle(_add(x, y, start, whole, totals), totals, sums):
            whole = start
        add_slowly(x, y, whole, stop, sums)


@kernel
def scan(x, sums):  # type: ignore[no-untyped-def]
    """Count the NaN and infinities of a copy, and add the squares of the rest as source and as decoded."""
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        whole = start + (stop - start) // LANES * LANES
        total = _add_squares(x, start, whole)
        if not (total == 0 or TRUSTED[0] < total < TRUSTED[1]):
            whole, total = start, np.float64(0)
        for at in range(whole, stop):
            value = np.float64(float_at(x, at))
            if np.isfinite(value):
                total += value * value
            else:
                sums[NONFINITE] += 1
        sums[SOURCE2] += total
        sums[DECODED2] += total
        sums[PRODUCT] += total


def merge(total: np.ndarray, sums: np.ndarray) -> None:
    """Add `sums` to `total` in place; the largest error is the larger of the two."""
    largest = max(total[MAX_ERROR], sums[MAX_ERROR])
    total += sums
    total[MAX_ERROR] = largest


def new_sums() -> np.ndarray:
    """Return the sums over no weights: float64 (SLOTS,) zeros."""
    return np.zeros(SLOTS)


def error_sums(numel: int, sums: np.ndarray) -> ErrorSums:
    """Return the sums over `numel` weights as a record."""
    return ErrorSums(
        numel=numel,
        error2=float(sums[ERROR2]),
        source2=float(sums[SOURCE2]),
        decoded2=float(sums[DECODED2]),
        product=float(sums[PRODUCT]),
        max_error=float(sums[MAX_ERROR]),
        nonfinite=int(sums[NONFINITE]),
        nonfinite_decoded=int(sums[NONFINITE_DECODED]),
        wrong=int(sums[WRONG]),
    )
