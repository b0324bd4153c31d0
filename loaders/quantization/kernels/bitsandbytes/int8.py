"""int8 by rows, as bitsandbytes' LLM.int8() quantizes weights: float16 first, then rounded multiples of absmax / 127.

w16 = float16(w); absmax = max|w16| of the row; code = rint(w16 * (1 / absmax * 127)), halves to even. The factor is
computed in two steps because torch divides a number by a tensor as the number times the reciprocal. All is in float32.
Rounding to float16 keeps order, so that a row's absmax is the rounding of its largest magnitude. A row of zeros, and
one that holds a NaN or an infinity, get codes 0, as torch casts a NaN to int8.

Dettmers et al. 2022, arXiv:2208.07339; bytes: bitsandbytes/backends/default/ops.py (int8_vectorwise_quant) and
nn/modules.py (Int8Params).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.compare import CHUNK, add_pairs
from loaders.quantization.kernels.intrinsics import prefetch
from loaders.quantization.kernels.lanes import F32, I8, I32, Array, Lanes, Value, kernel, vector

STEP = 64  # weights coded at once
LANES = 16  # weights rounded at once


@vector(types.uint32)
def _largest_bits(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the bits of the largest of STEP magnitudes in their dtype, as a uint32. NaN counts as the largest."""
    is_wide = x.element is F32
    kind = ir.VectorType(I32 if is_wide else x.element, STEP)
    bits = lanes.op("and_", lanes.b.bitcast(lanes.load(x, at, STEP), kind), 0x7FFFFFFF if is_wide else 0x7FFF)
    largest = lanes.reduce("umax", bits)
    return largest if is_wide else lanes.b.zext(largest, I32)


@vector(types.float32)
def _half_at(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return one weight rounded to float16, as float32."""
    return lanes.b.extract_element(lanes.rounded_to_f16(lanes.floats(x, at, 1)), ir.Constant(I32, 0))


@vector(types.void)
def _code(lanes: Lanes, x: Array, at: Value, inverse: Value, out: Array, to: Value) -> None:
    """Code STEP weights from `at` on."""
    factor, parts = lanes.splat(inverse, LANES), []
    for part in range(STEP // LANES):
        values = lanes.floats(x, lanes.op("add", at, LANES * part), LANES)
        half = values if x.holds == types.int16 else lanes.rounded_to_f16(values)
        whole = lanes.call(f"llvm.rint.v{LANES}f32", values.type, lanes.b.fmul(half, factor))
        parts.append(lanes.b.trunc(lanes.b.fptosi(whole, ir.VectorType(I32, LANES)), ir.VectorType(I8, LANES)))
    lanes.store(lanes.join(parts), out, to)


@kernel
def _absmax(x, start, stop):  # type: ignore[no-untyped-def]
    """Return the largest magnitude of x[start:stop] rounded to float16; it is NaN if one is.

    Only the step that holds the largest bits is rounded, and what is too short for a step.
    """
    at, best, where = start, np.uint32(0), start
    while at + STEP <= stop:
        largest = _largest_bits(x, at)
        if largest > best:
            best, where = largest, at
        at += STEP
    top = np.float32(0)
    for i in range(where, min(where + STEP, stop)):
        value = abs(_half_at(x, i))
        top = value if value > top or np.isnan(value) else top
        if np.isnan(top):
            return top
    for i in range(at, stop):
        value = abs(_half_at(x, i))
        top = value if value > top or np.isnan(value) else top
        if np.isnan(top):
            return top
    return top


@kernel
def encode_int8(x, columns, codes, absmax):  # type: ignore[no-untyped-def]
    """Code rows. x: (rows * columns,); codes: int8, as many; absmax: float32 (rows,)."""
    for row in range(absmax.size):
        start, stop = row * columns, (row + 1) * columns
        top = _absmax(x, start, stop)
        absmax[row] = top
        if not (top > 0 and np.isfinite(top)):
            codes[start:stop] = 0
            continue
        inverse = (np.float32(1) / top) * np.float32(127)
        at = start
        while at + STEP <= stop:
            prefetch(x, at + columns, at + columns + STEP)
            _code(x, at, inverse, codes, at)
            at += STEP
        for i in range(at, stop):
            codes[i] = np.int8(np.rint(_half_at(x, i) * inverse))


# --- decoding


@vector(types.void)
def _values(lanes: Lanes, codes: Array, at: Value, scale: Value, out: Array, to: Value) -> None:
    """Decode LANES codes from `at` on, multiplying twice as bitsandbytes' int8_vectorwise_dequant does."""
    wide = lanes.b.sext(lanes.load(codes, at, LANES), ir.VectorType(I32, LANES))
    values = lanes.b.sitofp(wide, ir.VectorType(F32, LANES))
    scaled = lanes.b.fmul(values, lanes.splat(scale, LANES))
    lanes.store(lanes.op("fmul", scaled, float(np.float32(1 / 127))), out, to)


@kernel
def compare(x, codes, column, columns, absmax, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x, (n,) raw weights, and (code * absmax) * fl(1/127) to `sums`: see compare.py.

    codes: int8 (n,), from `column` of a row of `columns` on; absmax: float32, that of each row that x reaches.
    """
    tile, totals = np.empty(CHUNK, np.float32), np.zeros(3, np.float64)
    for start in range(0, x.size, CHUNK):
        stop = min(start + CHUNK, x.size)
        at = start
        while at < stop:
            row = (column + at) // columns
            end, scale = min((row + 1) * columns - column, stop), absmax[row]
            while at + LANES <= end:
                _values(codes, at, scale, tile, at - start)
                at += LANES
            while at < end:
                tile[at - start] = (np.float32(codes[at]) * scale) * np.float32(1 / 127)
                at += 1
        add_pairs(x[start:stop], tile[: stop - start], totals, sums)
