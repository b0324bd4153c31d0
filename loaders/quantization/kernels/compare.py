"""How far decoded weights lie from their source: sums that add up over ranges, tensors and machines.

The sums are taken in float32 lanes and moved to float64 every CHUNK weights. A chunk whose squares leave float32's
range, or that holds a NaN or an infinity, is summed again in float64, weight by weight, over its finite pairs.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import I32, Array, Lanes, Value, kernel, vector

STEP = 32  # weights in one vector step
CHUNK = 4096
LANES = 16
# the slots of `sums`
ERROR2, SOURCE2, DECODED2, PRODUCT, MAX_ERROR, NONFINITE, NONFINITE_DECODED, SLOTS = range(8)
TRUSTED = (np.float32(1e-25), np.float32(1e30))  # of a chunk's sum of squares: none over- or underflowed that matter


@vector(types.void)
def _add(lanes: Lanes, x: Array, y: Array, at: Value, sums: Array) -> None:
    """STEP pairs into five rows of LANES float32 sums, in the order of the slots above."""
    starts = [ir.Constant(at.type, LANES * slot) for slot in range(5)]
    totals = [lanes.load(sums, start, LANES) for start in starts]
    for part in range(STEP // LANES):
        here = lanes.op("add", at, LANES * part)
        source, decoded = lanes.floats(x, here, LANES), lanes.floats(y, here, LANES)
        error = lanes.b.fsub(source, decoded)
        pairs = ((error, error), (source, source), (decoded, decoded), (source, decoded))
        for slot, (a, b) in enumerate(pairs):
            totals[slot] = lanes.b.fadd(totals[slot], lanes.b.fmul(a, b))
        totals[MAX_ERROR] = lanes.larger(lanes.absolute(error), totals[MAX_ERROR])
    for start, total in zip(starts, totals, strict=True):
        lanes.store(total, sums, start)


@vector(types.float32)
def float_at(lanes: Lanes, x: Array, at: Value) -> Value:
    """One weight as float32."""
    return lanes.b.extract_element(lanes.floats(x, at, 1), ir.Constant(I32, 0))


@vector(types.void)
def _add_squares(lanes: Lanes, x: Array, at: Value, sums: Array) -> None:
    """LANES squares into LANES float32 sums."""
    zero, values = ir.Constant(at.type, 0), lanes.floats(x, at, LANES)
    lanes.store(lanes.b.fadd(lanes.load(sums, zero, LANES), lanes.b.fmul(values, values)), sums, zero)


@kernel
def _add_slowly(x, y, start, stop, sums):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        a, b = np.float64(float_at(x, i)), np.float64(y[i])
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
def compare(x, y, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x and y to `sums`. x: (n,) raw weights; y: float32 (n,); sums: float64 (SLOTS,)."""
    lanes = np.zeros(5 * LANES, np.float32)
    totals = np.zeros(5, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        whole = start + (stop - start) // STEP * STEP
        lanes[:] = 0
        for at in range(start, whole, STEP):
            _add(x, y, at, lanes)
        for slot in range(4):
            totals[slot] = 0
            for lane in range(LANES):
                totals[slot] += lanes[slot * LANES + lane]
        is_trusted = TRUSTED[0] < totals[SOURCE2] < TRUSTED[1] and totals[DECODED2] < TRUSTED[1]
        is_nothing = totals[SOURCE2] == 0 and totals[DECODED2] == 0 and np.all(lanes[MAX_ERROR * LANES :] == 0)
        if not (is_trusted or is_nothing):
            whole = start
        else:
            for slot in range(4):
                sums[slot] += totals[slot]
            for lane in range(MAX_ERROR * LANES, (MAX_ERROR + 1) * LANES):
                sums[MAX_ERROR] = max(sums[MAX_ERROR], np.float64(lanes[lane]))
        _add_slowly(x, y, whole, stop, sums)


@kernel
def scan(x, sums):  # type: ignore[no-untyped-def]
    """Count the NaN and infinities of a copy, and add the squares of the rest as source and as decoded."""
    lanes = np.zeros(LANES, np.float32)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        whole = start + (stop - start) // LANES * LANES
        lanes[:] = 0
        for at in range(start, whole, LANES):
            _add_squares(x, at, lanes)
        total = np.float64(0)
        for lane in range(LANES):
            total += lanes[lane]
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
    """Add sums to a total, in place."""
    largest = max(total[MAX_ERROR], sums[MAX_ERROR])
    total += sums
    total[MAX_ERROR] = largest


def new_sums() -> np.ndarray:
    """Sums of nothing: float64 (SLOTS,)."""
    return np.zeros(SLOTS)
