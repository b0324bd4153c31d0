"""Integer codes of eight bits by row, a byte each, as compressed-tensors computes them: symmetric, without an offset.

For the arithmetic and its source see packed_int.py.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import rounding
from loaders.quantization.kernels.compare import add_pairs, float_at, tile_size
from loaders.quantization.kernels.compressed_tensors.packed_int import codes_of, store_quick_bytes
from loaders.quantization.kernels.intrinsics import prefetch
from loaders.quantization.kernels.lanes import I32, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.rounding import (
    STEP,
    float_of_bits,
    quick_inverse,
    quotient_like,
    top_bits,
    top_bits_1,
)


@vector(types.void)
def _code_quick(lanes: Lanes, x: Array, at: Value, inverse: Value, out: Array) -> None:
    store_quick_bytes(lanes, x, at, inverse, 0, out)


@vector(types.void)
def _code(lanes: Lanes, x: Array, at: Value, scale: Value, out: Array) -> None:
    rounding.store_bytes(lanes, codes_of(lanes, x, at, scale, 8, STEP), out, at)


@vector(types.void)
def _code_one(lanes: Lanes, x: Array, at: Value, scale: Value, out: Array) -> None:
    rounding.store_bytes(lanes, codes_of(lanes, x, at, scale, 8, 1), out, at)


@kernel
def encode_rows(x, columns, eps, out, scales):  # type: ignore[no-untyped-def]
    """Find symmetric codes of eight bits, a scale a row. x: (rows * columns,); scales: float32 (rows,).

    Scales are rounded to the dtype of x; one of zero becomes `eps`. out: the bits of int8 codes, as uint8
    (rows * columns,).
    """
    for r in range(scales.size):
        start, stop = r * columns, (r + 1) * columns
        whole = start + columns // STEP * STEP
        top = top_bits(x, start, whole)
        for at in range(whole, stop):
            top = max(top, top_bits_1(x, at))
        scale = quotient_like(x, float_of_bits(x, top), np.float32(127.5))
        scale = eps if scale == 0 else scale
        scales[r] = scale
        inverse = quick_inverse(x, scale)
        for at in range(start, whole, STEP):
            prefetch(x, at + columns, at + columns + STEP)
            if inverse:
                _code_quick(x, at, inverse, out)
            else:
                _code(x, at, scale, out)
        for at in range(whole, stop):
            _code_one(x, at, scale, out)


@vector(types.void)
def _plain_values(lanes: Lanes, codes: Array, at: Value, scale: Value, out: Array) -> None:
    wide = lanes.b.sext(lanes.load(codes, at, STEP), ir.VectorType(I32, STEP))
    values = lanes.b.sitofp(wide, rounding.floats(wide))
    lanes.store(lanes.b.fmul(values, lanes.splat(scale, STEP)), out, at)


@kernel
def decode_rows(codes, columns, scales, out):  # type: ignore[no-untyped-def]
    """Multiply int8 codes by their row's scale. codes: int8 (rows * columns,); scales: raw (rows,)."""
    for r in range(scales.size):
        start, stop, scale = r * columns, (r + 1) * columns, float_at(scales, r)
        whole = start + columns // STEP * STEP
        for at in range(start, whole, STEP):
            _plain_values(codes, at, scale, out)
        for at in range(whole, stop):
            out[at] = np.float32(codes[at]) * scale


@kernel
def compare_rows(x, codes, columns, scales, sums):  # type: ignore[no-untyped-def]
    """Add the differences of whole rows of raw weights and what `decode_rows` makes of the rest to `sums`."""
    step = tile_size(columns)
    tile, totals = np.empty(step, np.float32), np.zeros(3, np.float64)
    for start in range(0, x.size, step):
        stop = min(start + step, x.size)
        decoded = tile[: stop - start]
        decode_rows(codes[start:stop], columns, scales[start // columns : stop // columns], decoded)
        add_pairs(x[start:stop], decoded, totals, sums)
