"""E4M3 codes by row or by block of 128 x 128, as compressed-tensors computes them: each step in the weights' dtype.

scale = amax / 448;  code = E4M3 of clamp(w / scale, -448, 448). A scale of zero becomes the dtype's eps. A block at an
edge has fewer weights: compressed-tensors fills it up with zeros, which change no scale, and drops their codes again.

Source: compressed_tensors 0.20, quantization/utils/helpers.py (calculate_qparams), compressors/naive_quantized/base.py.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import rounding
from loaders.quantization.kernels.compare import (
    CHUNK,
    LANES,
    Group,
    add_groups,
    add_pairs,
    float_at,
    settle,
    tile_size,
)
from loaders.quantization.kernels.compressed_tensors import rows
from loaders.quantization.kernels.compressed_tensors.e4m3_bytes import (
    MANTISSAS,
    WIDE,
    begin_scale,
    code_wide,
    looks_up,
    mantissa_codes,
)
from loaders.quantization.kernels.compressed_tensors.groups import BLOCK
from loaders.quantization.kernels.intrinsics import prefetch
from loaders.quantization.kernels.lanes import I8, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.rounding import (
    GROUPS,
    STEP,
    float_of_bits,
    quick_inverse,
    quotient_like,
    symmetric_scales,
    top_bits,
    top_bits_1,
)

TOP = np.float32(448)  # the greatest value of E4M3


def _code(lanes: Lanes, x: Array, at: Value, scale: Value, out: Array, count: int) -> None:
    """Code `count` weights by a division."""
    quotients = lanes.b.fdiv(lanes.floats(x, at, count), lanes.splat(scale, count))
    rounding.store_bytes(lanes, rounding.to_e4m3(lanes, rounding.like(lanes, x, quotients)), out, at)


@vector(types.void)
def _code_step(lanes: Lanes, x: Array, at: Value, scale: Value, out: Array) -> None:
    _code(lanes, x, at, scale, out, STEP)


@vector(types.void)
def _code_quick(lanes: Lanes, x: Array, at: Value, inverse: Value, out: Array) -> None:
    """Code STEP bfloat16s by a product; see `rounding.quick`. Other dtypes have no inverse, and never come here."""
    if x.holds == types.uint16:
        even, odd = (
            rounding.quick_e4m3(lanes, rounding.quick(lanes, values, inverse)) for values in lanes.pairs(x, at, STEP)
        )
        rounding.store_byte_pairs(lanes, even, odd, out, at)


@vector(types.void)
def _code_one(lanes: Lanes, x: Array, at: Value, scale: Value, out: Array) -> None:
    _code(lanes, x, at, scale, out, 1)


@kernel
def _code_run(x, start, stop, scale, inverse, ahead, table, own, out):  # type: ignore[no-untyped-def]
    """Code weights [start, stop) of one scale, and ask the memory for those that lie `ahead`.

    inverse: `quick_inverse` of the scale; table: `mantissa_codes`; own: room for 128 bytes.
    """
    whole, wide = start + (stop - start) // STEP * STEP, start
    if inverse and looks_up(x):
        least, wide = begin_scale(scale, table, own, 0), start + (stop - start) // WIDE * WIDE
        for at in range(start, wide, WIDE):
            prefetch(x, at + ahead, at + ahead + WIDE)
            if not code_wide(x, at, own, 0, least, out):
                for part in range(at, at + WIDE, STEP):
                    _code_quick(x, part, inverse, out)
    for at in range(wide, whole, STEP):
        if inverse:
            prefetch(x, at + ahead, at + ahead + STEP)
            _code_quick(x, at, inverse, out)
        else:
            _code_step(x, at, scale, out)
    for at in range(whole, stop):
        _code_one(x, at, scale, out)


@kernel
def _encode_rows(x, columns, eps, table, out, scales):  # type: ignore[no-untyped-def]
    own = np.empty(MANTISSAS, np.uint8)
    for r in range(scales.size):
        start, stop = r * columns, (r + 1) * columns
        whole = start + columns // STEP * STEP
        top = top_bits(x, start, whole)
        for at in range(whole, stop):
            top = max(top, top_bits_1(x, at))
        scale = quotient_like(x, float_of_bits(x, top), TOP)
        scale = eps if scale == 0 else scale
        scales[r] = scale
        _code_run(x, start, stop, scale, quick_inverse(x, scale), columns, table, own, out)


def encode_rows(x: np.ndarray, columns: int, eps: np.float32, out: np.ndarray, scales: np.ndarray) -> None:
    """Code with a scale a row. x: (rows * columns,); out: uint8; scales: float32 (rows,), rounded to x's dtype."""
    _encode_rows(x, columns, eps, mantissa_codes(), out, scales)


@kernel
def _encode_band(x, columns, eps, table, out, scales):  # type: ignore[no-untyped-def]
    blocks, padded = scales.size, -(-scales.size // GROUPS) * GROUPS
    tops = np.zeros(padded, np.uint32)
    some, inverses = np.empty(padded, np.float32), np.empty(padded, np.float32)
    for row in range(0, x.size, columns):
        for b in range(blocks):
            start, stop = row + b * BLOCK, row + min((b + 1) * BLOCK, columns)
            whole = start + (stop - start) // STEP * STEP
            tops[b] = max(tops[b], top_bits(x, start, whole))
            for at in range(whole, stop):
                tops[b] = max(tops[b], top_bits_1(x, at))
    for b in range(0, blocks, GROUPS):
        symmetric_scales(x, tops, b, TOP, eps, some, inverses)
    own, leasts = np.empty(blocks * MANTISSAS, np.uint8), np.zeros(blocks, np.uint16)
    for b in range(blocks):
        scales[b] = some[b]
        if inverses[b] and looks_up(x):
            leasts[b] = begin_scale(some[b], table, own, b * MANTISSAS)
    for row in range(0, x.size, columns):
        for b in range(blocks):
            start, stop = row + b * BLOCK, row + min((b + 1) * BLOCK, columns)
            whole = start + (stop - start) // STEP * STEP
            if leasts[b] and stop - start == BLOCK:
                for at in range(start, stop, WIDE):
                    if not code_wide(x, at, own, b * MANTISSAS, leasts[b], out):
                        for part in range(at, at + WIDE, STEP):
                            _code_quick(x, part, inverses[b], out)
            elif inverses[b]:
                for at in range(start, whole, STEP):
                    _code_quick(x, at, inverses[b], out)
            else:
                for at in range(start, whole, STEP):
                    _code_step(x, at, some[b], out)
            for at in range(whole, stop):
                _code_one(x, at, some[b], out)


def encode_band(x: np.ndarray, columns: int, eps: np.float32, out: np.ndarray, scales: np.ndarray) -> None:
    """Code a band of up to BLOCK rows, with a scale for every BLOCK columns.

    x: (rows * columns,); out: uint8, as many; scales: float32 (blocks,), rounded to the dtype of x.
    """
    _encode_band(x, columns, eps, mantissa_codes(), out, scales)


# --- decoding


def _value(lanes: Lanes, codes: Array, at: Value, scale: Value, out: Array, count: int) -> None:
    """Decode `count` codes."""
    values = rounding.from_e4m3(lanes, lanes.load(codes, at, count))
    lanes.store(lanes.b.fmul(values, lanes.splat(scale, count)), out, at)


@vector(types.void)
def _value_step(lanes: Lanes, codes: Array, at: Value, scale: Value, out: Array) -> None:
    _value(lanes, codes, at, scale, out, STEP)


@vector(types.void)
def _value_one(lanes: Lanes, codes: Array, at: Value, scale: Value, out: Array) -> None:
    _value(lanes, codes, at, scale, out, 1)


@kernel
def _decode_run(codes, start, stop, scale, out):  # type: ignore[no-untyped-def]
    """Decode codes [start, stop) of one scale."""
    whole = start + (stop - start) // STEP * STEP
    for at in range(start, whole, STEP):
        _value_step(codes, at, scale, out)
    for at in range(whole, stop):
        _value_one(codes, at, scale, out)


@kernel
def decode_rows(codes, columns, scales, out):  # type: ignore[no-untyped-def]
    """Multiply the values of uint8 codes by their row's scale. scales: raw (rows,); out: float32."""
    for r in range(scales.size):
        _decode_run(codes, r * columns, (r + 1) * columns, float_at(scales, r), out)


@vector(types.boolean)
def _has_nan(lanes: Lanes, codes: Array, start: Value, stop: Value) -> Value:
    """Whether one of codes [start, stop), a multiple of STEP, is a NaN: then its magnitude is 0x7F."""
    whole = lanes.b.add(start, lanes.op("and_", lanes.b.sub(stop, start), -4 * STEP))

    def larger(at: Value, *largest: Value) -> list[Value]:
        [before] = largest
        magnitudes = lanes.op("and_", lanes.load(codes, at, before.type.count), 0x7F)
        return [lanes.b.select(lanes.b.icmp_unsigned(">", magnitudes, before), magnitudes, before)]

    [found] = lanes.fold(start, whole, 4 * STEP, [lanes.const(ir.VectorType(I8, 4 * STEP), 0)], larger)
    [rest] = lanes.fold(whole, stop, STEP, [lanes.const(ir.VectorType(I8, STEP), 0)], larger)
    top = ir.Constant(I8, 0x7F)
    return lanes.b.or_(*(lanes.b.icmp_unsigned("==", lanes.reduce("umax", each), top) for each in (found, rest)))


@vector(types.float64)
def _add(
    lanes: Lanes, x: Array, codes: Array, group: Value, scales: Array, start: Value, stop: Value, totals: Array
) -> Value:
    """Sum the differences of weights [start, stop) and their decoded codes: see `compare.add_groups`.

    None of the codes may be a NaN. Their values are taken times 2^-8 and the scales times 2^8, which leaves products as
    they are: scales are a 448th of a weight, and far from float32's end.
    """

    def of_group(g: Value) -> Group:
        return (lanes.op("fmul", lanes.shuffle(lanes.floats(scales, g, 1), [0] * LANES), 256.0),)

    def decoded(at: Value, own: Group) -> list[Value]:
        values = rounding.share_of_e4m3(lanes, lanes.load(codes, at, STEP))
        return [lanes.b.fmul(lanes.part(values, part, LANES), *own) for part in range(STEP // LANES)]

    return add_groups(lanes, x, start, stop, group, totals, of_group, decoded, in_order=STEP)


@kernel
def compare_rows(x, codes, columns, scales, sums):  # type: ignore[no-untyped-def]
    """Add the differences of whole rows of raw weights and what `decode_rows` makes of the rest to `sums`."""
    rows.compare_rows(x, codes, columns, scales, sums, _has_nan, _add, decode_rows)


@kernel
def decode_blocks(codes, columns, first, scales, out):  # type: ignore[no-untyped-def]
    """Multiply the values of whole rows by their blocks' scales, float32 (bands, blocks).

    `first` is the number of rows of the first band that lie before these.
    """
    for row in range(out.size // columns):
        band = (first + row) // BLOCK
        for b in range(scales.shape[1]):
            start, stop = row * columns + b * BLOCK, row * columns + min((b + 1) * BLOCK, columns)
            _decode_run(codes, start, stop, scales[band, b], out)


@kernel
def compare_blocks(x, codes, columns, first, scales, sums):  # type: ignore[no-untyped-def]
    """Add the differences of whole rows of raw weights and what `decode_blocks` makes of the rest to `sums`."""
    step, blocks = tile_size(columns), scales.shape[1]
    tile, totals, own = np.empty(step, np.float32), np.zeros(3, np.float64), np.empty(CHUNK // BLOCK, np.float32)
    for row in range(0, x.size, step):
        last = min(row + step, x.size)
        if columns % BLOCK:
            decode_blocks(codes[row:last], columns, first + row // columns, scales, tile)
            add_pairs(x[row:last], tile[: last - row], totals, sums)
            continue
        for start in range(row, last, CHUNK):
            stop = min(start + CHUNK, last)
            for b in range((stop - start) // BLOCK):
                block = start // BLOCK + b
                own[b] = scales[(first + block // blocks) // BLOCK, block % blocks]
            some, some_codes = x[start:stop], codes[start:stop]
            is_plain = not _has_nan(codes, start, stop)
            if not is_plain or not settle(_add(some, some_codes, BLOCK, own, 0, some.size, totals), totals, sums):
                decode_rows(some_codes, BLOCK, own[: some.size // BLOCK], tile)
                add_pairs(some, tile[: some.size], totals, sums)
