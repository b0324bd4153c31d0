"""Integer codes of eight bits by row, a byte each, as compressed-tensors computes them: symmetric, without an offset.

For the arithmetic and its source see packed_int.py.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import rounding
from loaders.quantization.kernels.compare import LANES, Group, add_groups, float_at
from loaders.quantization.kernels.compressed_tensors import rows
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


@vector(types.float64)
def _add(
    lanes: Lanes, x: Array, codes: Array, group: Value, scales: Array, start: Value, stop: Value, totals: Array
) -> Value:
    """Sum the differences of weights [start, stop) and their decoded codes: see `compare.add_groups`."""

    def of_group(g: Value) -> Group:
        return (lanes.shuffle(lanes.floats(scales, g, 1), [0] * LANES),)

    def decoded(at: Value, own: Group) -> list[Value]:
        codes_here = lanes.load(codes, at, STEP)
        parts = (lanes.part(codes_here, part, LANES) for part in range(STEP // LANES))
        wide = (lanes.b.sext(each, ir.VectorType(I32, LANES)) for each in parts)
        return [lanes.b.fmul(lanes.b.sitofp(each, rounding.floats(each)), *own) for each in wide]

    return add_groups(lanes, x, start, stop, group, totals, of_group, decoded, in_order=STEP)


@vector(types.boolean)
def _has_nan(lanes: Lanes, codes: Array, start: Value, stop: Value) -> Value:
    return ir.Constant(ir.IntType(1), 0)  # an integer never is


@kernel
def compare_rows(x, codes, columns, scales, sums):  # type: ignore[no-untyped-def]
    """Add the differences of whole rows of raw weights and what `decode_rows` makes of the rest to `sums`."""
    rows.compare_rows(x, codes, columns, scales, sums, _has_nan, _add, decode_rows)
