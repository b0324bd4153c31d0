"""Integer codes by group, packed, as compressed-tensors computes them: every operation in the weights' dtype.

Symmetric:  scale = amax / ((2^bits - 1) / 2);  code = clamp(round(w / scale), -2^(bits-1), 2^(bits-1) - 1)
Asymmetric, four bits:  low = min(w, 0), high = max(w, 0);  scale = (high - low) / 15;
    zero = round(clamp(-8 - low / scale, -8, 7));  code = clamp(round(w / scale + zero), -8, 7)
A scale of zero becomes the dtype's eps, and the zero of a group of zeros is 0.

Packed, a code is stored plus 2^(bits-1), the first in a little-endian word's lowest bits: nibbles or bytes in order.

Source: compressed_tensors 0.20, quantization/utils/helpers.py (calculate_qparams),
quantization/lifecycle/forward_helpers.py (_quantize), compressors/pack_quantized/helpers.py (pack_to_int32).

Every coder of STEP weights has a twin named "quick" for bfloat16 weights and scales of ordinary size: it multiplies by
an inverse where the other divides; see `rounding.quick`. `quick_inverse` is 0 for other dtypes, so that the twin is
never called for them, and its body is compiled empty.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from loaders.quantization.kernels import rounding
from loaders.quantization.kernels.compare import (
    Group,
    add_groups,
    add_slowly,
    float_at,
    settle,
    tile_size,
)
from loaders.quantization.kernels.intrinsics import prefetch
from loaders.quantization.kernels.lanes import F32, I16, I32, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.rounding import (
    BATCH,
    GROUPS,
    STEP,
    symmetric_scales,
    top_bits,
)


def _quotients(lanes: Lanes, x: Array, at: Value, scale: Value, count: int) -> Value:
    """Divide `count` weights by a scale in the arithmetic of their dtype."""
    return rounding.like(lanes, x, lanes.b.fdiv(lanes.floats(x, at, count), lanes.splat(scale, count)))


def codes_of(lanes: Lanes, x: Array, at: Value, scale: Value, bits: int, count: int) -> Value:
    """Return the symmetric codes of `count` weights, as signed int32 lanes."""
    half = 1 << (bits - 1)
    return rounding.to_integers(lanes, _quotients(lanes, x, at, scale, count), -half, half - 1)


@vector(types.void)
def _pack_4(lanes: Lanes, x: Array, at: Value, scale: Value, packed: Array) -> None:
    codes = lanes.op("add", codes_of(lanes, x, at, scale, 4, STEP), 8)
    rounding.store_nibbles(lanes, codes, packed, lanes.op("lshr", at, 1))


@vector(types.void)
def _pack_8(lanes: Lanes, x: Array, at: Value, scale: Value, packed: Array) -> None:
    rounding.store_bytes(lanes, lanes.op("add", codes_of(lanes, x, at, scale, 8, STEP), 128), packed, at)


@vector(types.void)
def _pack_4_quick(lanes: Lanes, x: Array, at: Value, inverse: Value, packed: Array) -> None:
    if x.holds == types.uint16:
        codes = [
            rounding.quick_integers(lanes, rounding.quick(lanes, values, inverse), -8, 7, 8)
            for values in lanes.pairs(x, at, STEP)
        ]
        rounding.store_nibble_pairs(lanes, codes[0], codes[1], packed, lanes.op("lshr", at, 1))


def store_quick_bytes(lanes: Lanes, x: Array, at: Value, inverse: Value, shift: int, out: Array) -> None:
    """Code STEP bfloat16s into a byte each, plus `shift`."""
    if x.holds == types.uint16:
        codes = [
            rounding.quick_integers(lanes, rounding.quick(lanes, values, inverse), -128, 127, shift)
            for values in lanes.pairs(x, at, STEP)
        ]
        rounding.store_byte_pairs(lanes, codes[0], codes[1], out, at)


@vector(types.void)
def _pack_8_quick(lanes: Lanes, x: Array, at: Value, inverse: Value, packed: Array) -> None:
    store_quick_bytes(lanes, x, at, inverse, 128, packed)


@vector(types.void)
def _pack_zero_quick(lanes: Lanes, x: Array, at: Value, inverse: Value, zero: Value, packed: Array) -> None:
    if x.holds == types.uint16:
        codes = []
        for values in lanes.pairs(x, at, STEP):
            quotients = rounding.quick(lanes, values, inverse)
            shifted = rounding.like(lanes, x, lanes.b.fadd(quotients, lanes.splat(zero, STEP // 2)))
            codes.append(rounding.quick_integers(lanes, shifted, -8, 7, 8))
        rounding.store_nibble_pairs(lanes, codes[0], codes[1], packed, lanes.op("lshr", at, 1))


@vector(types.void)
def _pack_zero(lanes: Lanes, x: Array, at: Value, scale: Value, zero: Value, packed: Array) -> None:
    shifted = lanes.b.fadd(_quotients(lanes, x, at, scale, STEP), lanes.splat(zero, STEP))
    codes = rounding.to_integers(lanes, rounding.like(lanes, x, shifted), -8, 7)
    rounding.store_nibbles(lanes, lanes.op("add", codes, 8), packed, lanes.op("lshr", at, 1))


@vector(types.void)
def _ends(lanes: Lanes, x: Array, start: Value, stop: Value, lows: Array, highs: Array, slot: Value) -> None:
    """Put the least and the greatest of weights [start, stop) and 0 into a slot, as int32s that sort as floats do."""
    kind = ir.VectorType(I32 if x.element is F32 else I16, STEP)
    width = kind.element.width - 1
    found = [cgutils.alloca_once_value(lanes.b, lanes.const(kind, 0)) for _ in range(2)]  # type: ignore[no-untyped-call]
    with cgutils.for_range_slice(lanes.b, start, stop, ir.Constant(start.type, STEP), inc=True) as (at, _):
        bits = lanes.b.bitcast(lanes.load(x, at, STEP), kind)
        sortable = lanes.b.xor(bits, lanes.op("and_", lanes.op("ashr", bits, width), (1 << width) - 1))
        for end, comparison in zip(found, "<>", strict=True):
            before = lanes.b.load(end)
            lanes.b.store(lanes.b.select(lanes.b.icmp_signed(comparison, sortable, before), sortable, before), end)
    for end, name, out in zip(found, ("smin", "smax"), (lows, highs), strict=True):
        value = lanes.reduce(name, lanes.b.load(end))
        value = value if x.element is F32 else lanes.b.sext(value, I32)
        lanes.b.store(value, lanes.b.gep(out.data, [slot]))


@vector(types.void)
def _zeros_and_scales(
    lanes: Lanes,
    x: Array,
    lows: Array,
    highs: Array,
    at: Value,
    eps: Value,
    zeros: Array,
    scales: Array,
    inverses: Array,
) -> None:
    """Compute zeros, as whole float32s, and scales of GROUPS groups from their ends, rounding after every operation.

    `lows` and `highs` are integers that sort as the floats do: a positive number's bits are the integer itself, and the
    bits of a negative number's magnitude are its complement.
    """
    low, high = lanes.load(lows, at, GROUPS), lanes.load(highs, at, GROUPS)
    nothing = lanes.const(ir.VectorType(F32, GROUPS), 0.0)
    least = lanes.b.fneg(rounding.values_of_bits(lanes, x, lanes.op("xor", low, -1)))
    is_negative = lanes.b.icmp_signed("<", low, lanes.const(low.type, 0))
    least = lanes.b.select(is_negative, least, nothing)
    spread = rounding.like(lanes, x, lanes.b.fsub(rounding.values_of_bits(lanes, x, high), least))
    scale = rounding.like(lanes, x, lanes.op("fdiv", spread, 15.0))
    quotient = rounding.like(lanes, x, lanes.b.fdiv(least, scale))
    zero = rounding.like(lanes, x, lanes.b.fsub(lanes.const(least.type, -8.0), quotient))
    whole = rounding.to_integers(lanes, zero, -8, 7)
    is_nan = lanes.b.fcmp_unordered("uno", zero, zero)
    lanes.store(lanes.b.select(is_nan, nothing, lanes.b.sitofp(whole, zero.type)), zeros, at)
    rounding.store_scales(lanes, x, scale, eps, at, scales, inverses)


@kernel
def encode(x, group, bits, eps, packed, scales):  # type: ignore[no-untyped-def]
    """Find and pack symmetric codes of four or eight bits.

    x: (n,) in groups of a multiple of STEP; eps: what a scale of zero becomes; packed: uint8 (n * bits / 8,); scales:
    float32 (n / group,), rounded to the dtype of x.
    """
    half = np.float32(7.5) if bits == 4 else np.float32(127.5)
    tops = np.zeros(BATCH, np.uint32)
    some, inverses = np.empty(BATCH, np.float32), np.empty(BATCH, np.float32)
    for first in range(0, scales.size, BATCH):
        count = min(BATCH, scales.size - first)
        for slot in range(count):
            tops[slot] = top_bits(x, (first + slot) * group, (first + slot + 1) * group)
        for slot in range(0, count, GROUPS):
            symmetric_scales(x, tops, slot, half, eps, some, inverses)
        for slot in range(count):
            start, scale, inverse = (first + slot) * group, some[slot], inverses[slot]
            scales[first + slot] = scale
            prefetch(x, start + BATCH * group, start + BATCH * group + group)
            if inverse and bits == 4:
                for at in range(start, start + group, STEP):
                    _pack_4_quick(x, at, inverse, packed)
            elif inverse:
                for at in range(start, start + group, STEP):
                    _pack_8_quick(x, at, inverse, packed)
            elif bits == 4:
                for at in range(start, start + group, STEP):
                    _pack_4(x, at, scale, packed)
            else:
                for at in range(start, start + group, STEP):
                    _pack_8(x, at, scale, packed)


@kernel
def encode_zero(x, group, eps, packed, scales, zeros):  # type: ignore[no-untyped-def]
    """Find and pack asymmetric codes of four bits. zeros: int8 (n / group,), -8 to 7; the rest as in `encode`."""
    lows, highs = np.zeros(BATCH, np.int32), np.zeros(BATCH, np.int32)
    some, inverses, wholes = np.empty(BATCH, np.float32), np.empty(BATCH, np.float32), np.empty(BATCH, np.float32)
    for first in range(0, scales.size, BATCH):
        count = min(BATCH, scales.size - first)
        for slot in range(count):
            _ends(x, (first + slot) * group, (first + slot + 1) * group, lows, highs, slot)
        for slot in range(0, count, GROUPS):
            _zeros_and_scales(x, lows, highs, slot, eps, wholes, some, inverses)
        for slot in range(count):
            start, scale, inverse, zero = (first + slot) * group, some[slot], inverses[slot], wholes[slot]
            scales[first + slot] = scale
            zeros[first + slot] = np.int8(zero)
            prefetch(x, start + BATCH * group, start + BATCH * group + group)
            if inverse:
                for at in range(start, start + group, STEP):
                    _pack_zero_quick(x, at, inverse, zero, packed)
            else:
                for at in range(start, start + group, STEP):
                    _pack_zero(x, at, scale, zero, packed)


def pack_zeros(zeros: np.ndarray) -> np.ndarray:
    """Pack int8 (R, G) zeros into uint32 (ceil(R / 8), G): eight rows to a word, the first lowest.

    The bits of rows beyond the last are 0.
    """
    rows, groups = zeros.shape
    codes = np.zeros((-(-rows // 8) * 8, groups), np.uint32)
    codes[:rows] = zeros.astype(np.int32) + 8
    eights = codes.reshape(-1, 8, groups)
    words = np.zeros((eights.shape[0], groups), np.uint32)
    for row in range(8):
        words |= eights[:, row] << np.uint32(4 * row)
    return words


# --- decoding


def _pairs(lanes: Lanes, packed: Array, at: Value, bits: int, shift: Value, scale: Value) -> tuple[Value, Value]:
    """Return (code - shift) * scale of STEP weights, those at even places and those at odd ones."""
    kind, half = ir.VectorType(I32, STEP // 2), STEP // 2
    if bits == 4:
        codes = lanes.b.zext(lanes.load(packed, lanes.op("lshr", at, 1), half), kind)
    else:
        words = lanes.b.bitcast(lanes.load(packed, at, STEP), ir.VectorType(I16, half))
        codes = lanes.b.zext(words, kind)
    even, odd = lanes.op("and_", codes, (1 << bits) - 1), lanes.op("lshr", codes, bits)

    def value(codes: Value) -> Value:
        return lanes.b.fmul(lanes.b.fsub(lanes.b.sitofp(codes, rounding.floats(codes)), shift), scale)

    return value(even), value(odd)


def _unpack(lanes: Lanes, packed: Array, at: Value, bits: int, shift: Value, scale: Value, out: Array) -> None:
    pairs = _pairs(lanes, packed, at, bits, lanes.splat(shift, STEP // 2), lanes.splat(scale, STEP // 2))
    lanes.store(lanes.interleaved(*pairs), out, at)


@vector(types.void)
def _unpack_4(lanes: Lanes, packed: Array, at: Value, shift: Value, scale: Value, out: Array) -> None:
    _unpack(lanes, packed, at, 4, shift, scale, out)


@vector(types.void)
def _unpack_8(lanes: Lanes, packed: Array, at: Value, shift: Value, scale: Value, out: Array) -> None:
    _unpack(lanes, packed, at, 8, shift, scale, out)


def _add(
    lanes: Lanes,
    bits: int,
    x: Array,
    packed: Array,
    group: Value,
    scales: Array,
    shifts: Array,
    start: Value,
    stop: Value,
    totals: Array,
) -> Value:
    """Sum the differences of weights [start, stop) and their decoded codes: see `compare.add_groups`."""

    def of_group(g: Value) -> Group:
        scale = lanes.b.extract_element(lanes.floats(scales, g, 1), ir.Constant(I32, 0))
        return lanes.splat(lanes.b.load(lanes.b.gep(shifts.data, [g])), STEP // 2), lanes.splat(scale, STEP // 2)

    def decoded(at: Value, own: Group) -> tuple[Value, Value]:
        return _pairs(lanes, packed, at, bits, *own)

    return add_groups(lanes, x, start, stop, group, totals, of_group, decoded)


@vector(types.float64)
def _add_4(
    lanes: Lanes,
    x: Array,
    packed: Array,
    group: Value,
    scales: Array,
    shifts: Array,
    start: Value,
    stop: Value,
    totals: Array,
) -> Value:
    return _add(lanes, 4, x, packed, group, scales, shifts, start, stop, totals)


@vector(types.float64)
def _add_8(
    lanes: Lanes,
    x: Array,
    packed: Array,
    group: Value,
    scales: Array,
    shifts: Array,
    start: Value,
    stop: Value,
    totals: Array,
) -> Value:
    return _add(lanes, 8, x, packed, group, scales, shifts, start, stop, totals)


@kernel
def decode(packed, group, bits, scales, shifts, out):  # type: ignore[no-untyped-def]
    """Decode (stored code - shift) * scale. packed: uint8; out: float32 (n,).

    scales, raw, and shifts, float32: one a group. Groups are of a multiple of STEP weights.
    """
    for g in range(scales.size):
        scale = float_at(scales, g)
        for at in range(g * group, (g + 1) * group, STEP):
            if bits == 4:
                _unpack_4(packed, at, shifts[g], scale, out)
            else:
                _unpack_8(packed, at, shifts[g], scale, out)


@kernel
def compare(x, packed, group, bits, scales, shifts, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x, (n,) raw weights, and what `decode` makes of the rest to `sums`: see compare.py."""
    step, totals = tile_size(group), np.zeros(3, np.float64)
    for start in range(0, x.size, step):
        stop = min(start + step, x.size)
        if bits == 4:
            largest = _add_4(x, packed, group, scales, shifts, start, stop, totals)
        else:
            largest = _add_8(x, packed, group, scales, shifts, start, stop, totals)
        if not settle(largest, totals, sums):
            own, decoded = slice(start // group, stop // group), np.empty(stop - start, np.float32)
            decode(packed[start * bits // 8 : stop * bits // 8], group, bits, scales[own], shifts[own], decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)


@kernel
def decode_any(packed, bits, columns, group, scales, shifts, out):  # type: ignore[no-untyped-def]
    """Decode as `decode` does, for groups and rows of any length. Each row of `columns` codes begins a word.

    scales, shifts: float32 (rows, groups).
    """
    row_bytes = (columns * bits + 31) // 32 * 4
    mask = (1 << bits) - 1
    for r in range(scales.shape[0]):
        for c in range(columns):
            at = c * bits
            code = (packed[r * row_bytes + at // 8] >> (at % 8)) & mask
            g = c // group
            out[r * columns + c] = (np.float32(code) - shifts[r, g]) * scales[r, g]


def unpack_zeros(words: np.ndarray, rows: int) -> np.ndarray:
    """Unpack uint32 (ceil(rows / 8), G) words into float32 (rows, G) shifts: zeros plus 8, as they are stored."""
    shifts = np.arange(8, dtype=np.uint32) * np.uint32(4)
    codes = (words[:, None, :] >> shifts[None, :, None]) & np.uint32(15)
    return np.ascontiguousarray(codes.reshape(-1, words.shape[1])[:rows]).astype(np.float32)
