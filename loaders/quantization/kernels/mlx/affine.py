"""MLX's affine codes: groups of weights between a least and a greatest value, `bits` bits each.

The arithmetic is that of mlx.core.quantize 0.32 on a CPU (mlx/backend/cpu/quantized.cpp), in float32, bit by bit. For a
group, with n = 2^bits - 1:
    scale = max((greatest - least) / n, 1e-7), negated unless |least| > |greatest|
    edge  = the end of greater magnitude; q = rint(edge / scale)
    where q is not 0: scale = edge / q, bias = edge; else bias = 0
    code  = clip(rint((w - bias) / scale), 0, n), by scale and bias before they are rounded to the weights' dtype
So zero, where it lies within the range, is the value of a code. Codes are a stream of bits, the first in the lowest: a
byte holds two codes of four bits, three bytes hold eight codes of three. The least and greatest weight pass over NaN;
the codes of NaN, and of a group with an infinity, are whatever the arithmetic makes of them.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from loaders.quantization.kernels.compare import add_pairs, float_at, tile_size
from loaders.quantization.kernels.intrinsics import prefetch
from loaders.quantization.kernels.lanes import F32, I8, I16, I32, Array, Lanes, Value, kernel, vector

STEP = 32  # weights coded at once
LANES = 16  # groups whose scales are computed at once
SMALLEST_SCALE = 1e-7  # MLX's `eps`
TO_INTEGER = 1.5 * 2.0**23  # adding it to a float32 below 2^22 leaves the nearest integer in the low bits
WHOLE = 2.0**23  # from here on, all float32s are integers
I64 = ir.IntType(64)
BITS = (4, 8, 2, 3, 5, 6)  # tried in this order for each group: the usual ones first


# --- encoding


def _value(lanes: Lanes, x: Array, bits: Value) -> Value:
    """Return the float32 value of one weight's raw bits."""
    if x.element is F32:
        return lanes.b.bitcast(bits, F32)
    one = lanes.splat(bits, 1)
    values = lanes.from_bf16(one) if x.holds == types.uint16 else lanes.from_f16(one)
    return lanes.b.extract_element(values, ir.Constant(I32, 0))


@vector(types.void)
def _range(lanes: Lanes, x: Array, start: Value, stop: Value, lows: Array, highs: Array, slot: Value) -> None:
    """Put the least and the greatest weight of a group [start, stop) into entry `slot`.

    Raw bits are compared as integers: of bfloat16 and float16, twice as many fit a register as of float32. NaNs sort
    beyond the infinities, so that one of the two is NaN if the group holds one.
    """
    kind = ir.VectorType(I32 if x.element is F32 else I16, STEP)
    width = kind.element.width - 1

    def sortable(bits: Value) -> Value:
        """Map float bits to integers that sort as the floats do, NaNs at the ends. The map is its own inverse."""
        return lanes.b.xor(bits, lanes.op("and_", lanes.op("ashr", bits, width), (1 << width) - 1))

    def extend(at: Value, low: Value, high: Value) -> list[Value]:
        found = sortable(lanes.b.bitcast(lanes.load(x, at, STEP), kind))
        low = lanes.b.select(lanes.b.icmp_signed("<", found, low), found, low)
        return [low, lanes.b.select(lanes.b.icmp_signed(">", found, high), found, high)]

    limits = [lanes.const(kind, (1 << width) - 1), lanes.const(kind, -(1 << width))]
    ends = lanes.fold(start, stop, STEP, limits, extend)
    for array, name, end in zip((lows, highs), ("smin", "smax"), ends, strict=True):
        value = _value(lanes, x, sortable(lanes.reduce(name, end)))
        lanes.b.store(value, lanes.b.gep(array.data, [slot]))


@vector(types.boolean)
def _ranges(lanes: Lanes, x: Array, start: Value, group: Value, lows: Array, highs: Array) -> Value:
    """Find the least and the greatest weights of LANES groups of 16-bit floats; False where `_range` must find them.

    Of raw bits as integers, those of the greatest weight are the greatest signed ones, if it is positive, and those of
    the least the greatest unsigned ones, if it is negative. Groups of one sign are left to `_range`.
    """
    if x.element is F32:
        return ir.Constant(ir.IntType(1), 0)
    kind = ir.VectorType(I16, STEP)
    pairs = []
    for slot in range(LANES):
        first = lanes.b.add(start, lanes.op("mul", group, slot))

        def extend(at: Value, low: Value, high: Value) -> list[Value]:
            found = lanes.load(x, at, STEP)
            low = lanes.b.select(lanes.b.icmp_unsigned(">", found, low), found, low)
            return [low, lanes.b.select(lanes.b.icmp_signed(">", found, high), found, high)]

        ends = [lanes.const(kind, 0), lanes.const(kind, -(1 << 15))]
        pairs.append(lanes.fold(first, lanes.b.add(first, group), STEP, ends, extend))
    low = lanes.each_reduced("umax", [pair[0] for pair in pairs])
    high = lanes.each_reduced("smax", [pair[1] for pair in pairs])
    for array, bits in ((lows, low), (highs, high)):
        values = lanes.from_bf16(bits) if x.holds == types.uint16 else lanes.from_f16(bits)
        lanes.store(values, array, ir.Constant(I64, 0))
    is_mixed = lanes.b.icmp_signed("<", lanes.b.and_(low, lanes.op("xor", high, -1)), lanes.const(low.type, 0))
    return lanes.reduce("and", is_mixed)


@kernel
def _range_of_numbers(x, start, stop, lows, highs, slot):  # type: ignore[no-untyped-def]
    """Put the least and the greatest weight that is no NaN, as `_range` does."""
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for at in range(start, stop):
        value = float_at(x, at)
        low, high = value if value < low else low, value if value > high else high
    lows[slot], highs[slot] = low, high


def _rint(lanes: Lanes, value: Value) -> Value:
    """Round to the nearest integer, halves to even, without an instruction for it, which baseline x86-64 lacks."""
    size = lanes.absolute(value)
    whole = lanes.op("fsub", lanes.op("fadd", size, WHOLE), WHOLE)
    whole = lanes.b.select(lanes.b.fcmp_ordered("<", size, lanes.const(size.type, WHOLE)), whole, size)
    is_negative = lanes.b.fcmp_ordered("<", value, lanes.const(size.type, 0))
    return lanes.b.select(is_negative, lanes.b.fneg(whole), whole)


@vector(types.void)
def _scales(lanes: Lanes, lows: Array, highs: Array, top: Value, scales: Array, biases: Array) -> None:
    """Compute scales and biases of LANES groups from their least and greatest weights; `top` is 2^bits - 1."""
    start, zero = ir.Constant(I64, 0), lanes.const(ir.VectorType(F32, LANES), 0)
    low, high = lanes.load(lows, start, LANES), lanes.load(highs, start, LANES)
    is_low = lanes.b.fcmp_ordered(">", lanes.absolute(low), lanes.absolute(high))
    scale = lanes.b.fdiv(lanes.b.fsub(high, low), lanes.splat(top, LANES))
    scale = lanes.larger(scale, lanes.const(scale.type, np.float32(SMALLEST_SCALE)))
    scale = lanes.b.select(is_low, scale, lanes.b.fneg(scale))
    edge = lanes.b.select(is_low, low, high)
    steps = _rint(lanes, lanes.b.fdiv(edge, scale))
    has_steps = lanes.b.fcmp_unordered("!=", steps, zero)
    lanes.store(lanes.b.select(has_steps, lanes.b.fdiv(edge, steps), scale), scales, start)
    lanes.store(lanes.b.select(has_steps, edge, zero), biases, start)


def packed_bits(lanes: Lanes, codes: Value, bits: int) -> Value:
    """Pack codes (int8 lanes, a multiple of eight) into a stream of bits: `bits` bytes for every eight codes."""
    while 8 % bits == 0 and bits < 8:  # each step puts two neighbours into one byte
        pairs = lanes.b.bitcast(codes, ir.VectorType(I16, codes.type.count // 2))
        both = lanes.b.or_(pairs, lanes.op("lshr", pairs, 8 - bits))
        codes, bits = lanes.b.trunc(both, ir.VectorType(I8, pairs.type.count)), 2 * bits
    if bits == 8:
        return codes
    count = codes.type.count
    # Codes that cross bytes: pairs, fours and eights are closed up in ever wider lanes, until eight codes fill the low
    # `bits` bytes of a 64-bit lane.
    for width, narrow, wide in ((bits, I8, I16), (2 * bits, I16, I32), (4 * bits, I32, I64)):
        pairs = lanes.b.bitcast(codes, ir.VectorType(wide, codes.type.count // 2))
        first = lanes.op("and_", pairs, (1 << narrow.width) - 1)
        codes = lanes.b.or_(first, lanes.op("shl", lanes.op("lshr", pairs, narrow.width), width))
    whole = lanes.b.bitcast(codes, ir.VectorType(I8, count))
    return lanes.shuffle(whole, [8 * eight + byte for eight in range(count // 8) for byte in range(bits)])


@vector(types.void)
def _code_group(
    lanes: Lanes,
    x: Array,
    start: Value,
    stop: Value,
    bits: Value,
    scale: Value,
    bias: Value,
    packed: Array,
) -> None:
    """Code weights [start, stop) into their place among the packed bytes.

    `bits` is known only when the kernel runs, so there is a loop for each width, and a branch chooses one.
    """
    for known in BITS:
        with (
            lanes.b.if_then(lanes.b.icmp_signed("==", bits, ir.Constant(bits.type, known))),
            cgutils.for_range_slice(lanes.b, start, stop, ir.Constant(start.type, STEP), inc=True) as (at, _),
        ):
            codes = _codes(lanes, x, at, known, scale, bias)
            place = lanes.op("mul", lanes.op("lshr", at, 3), known)
            lanes.store(packed_bits(lanes, codes, known), packed, place)


def _codes(lanes: Lanes, x: Array, at: Value, bits: int, scale: Value, bias: Value) -> Value:
    """Return the codes of STEP weights as int8 lanes.

    Only the upper bound needs clipping: steps are counted from the bias, an end of the range, towards the other end.
    """
    pair = []
    for values in lanes.pairs(x, at, STEP):
        offsets = lanes.b.fsub(values, lanes.splat(bias, STEP // 2))
        steps = lanes.b.fdiv(offsets, lanes.splat(scale, STEP // 2))
        pair.append(lanes.b.bitcast(lanes.op("fadd", steps, TO_INTEGER), ir.VectorType(I32, STEP // 2)))
    codes = lanes.woven(*pair)
    top = lanes.const(codes.type, (1 << bits) - 1)
    codes = lanes.b.select(lanes.b.icmp_unsigned("<", codes, top), codes, top)
    return lanes.b.trunc(codes, ir.VectorType(I8, STEP))


@kernel
def encode(x, bits, group, packed, scales, biases):  # type: ignore[no-untyped-def]
    """Code whole groups. x: (n,) raw weights, n = len(scales) * group; group: 32, 64 or 128; bits: 2 to 6, or 8.

    packed: uint8 (n * bits / 8,); scales, biases: float32 (n / group,), not yet rounded to the weights' dtype.
    """
    lows, highs = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    some_scales, some_biases = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    top = np.float32((1 << bits) - 1)
    for first in range(0, scales.size, LANES):
        count = min(LANES, scales.size - first)
        is_found = count == LANES and _ranges(x, first * group, group, lows, highs)
        for slot in range(count):
            start = (first + slot) * group
            if not is_found:
                _range(x, start, start + group, lows, highs, slot)
            if not lows[slot] <= highs[slot]:
                _range_of_numbers(x, start, start + group, lows, highs, slot)
        _scales(lows, highs, top, some_scales, some_biases)
        for slot in range(count):
            start, scale, bias = (first + slot) * group, some_scales[slot], some_biases[slot]
            prefetch(x, start + LANES * group, start + LANES * group + group)
            _code_group(x, start, start + group, bits, scale, bias, packed)
            scales[first + slot] = scale
            biases[first + slot] = bias


# --- decoding


@vector(types.void)
def _decode_group(
    lanes: Lanes, packed: Array, start: Value, stop: Value, bits: Value, scale: Value, bias: Value, out: Array
) -> None:
    """Decode weights [start, stop) from their place among the packed bytes."""
    for known in BITS:
        with (
            lanes.b.if_then(lanes.b.icmp_signed("==", bits, ir.Constant(bits.type, known))),
            cgutils.for_range_slice(lanes.b, start, stop, ir.Constant(start.type, STEP), inc=True) as (at, _),
        ):
            raw = lanes.load(packed, lanes.op("mul", lanes.op("lshr", at, 3), known), STEP // 8 * known)
            for part in range(STEP // LANES):
                steps = lanes.b.sitofp(_unpacked(lanes, raw, part, known), ir.VectorType(F32, LANES))
                values = lanes.b.fmul(steps, lanes.splat(scale, LANES))
                values = lanes.b.fadd(values, lanes.splat(bias, LANES))
                lanes.store(values, out, lanes.op("add", at, LANES * part))


def _unpacked(lanes: Lanes, raw: Value, part: int, bits: int) -> Value:
    """Return codes [part * LANES, (part + 1) * LANES) of STEP, as int32 lanes.

    A code begins in one byte and may end in the next, so each lane takes both and shifts its code down.
    """
    kind, starts = ir.VectorType(I32, LANES), [(LANES * part + lane) * bits for lane in range(LANES)]
    firsts = [start // 8 for start in starts]
    codes = lanes.b.zext(lanes.shuffle(raw, firsts), kind)
    if 8 % bits:
        nexts = [min(first + 1, raw.type.count - 1) for first in firsts]
        codes = lanes.b.or_(codes, lanes.op("shl", lanes.b.zext(lanes.shuffle(raw, nexts), kind), 8))
    shifted = lanes.b.lshr(codes, lanes.const(kind, [start % 8 for start in starts]))
    return lanes.op("and_", shifted, (1 << bits) - 1)


@kernel
def decode(packed, scales, biases, bits, group, out):  # type: ignore[no-untyped-def]
    """Decode whole groups, code * scale + bias.

    packed: uint8 (n * bits / 8,); scales, biases: raw or float32 (n / group,); out: float32 (n,).
    """
    for g in range(scales.size):
        scale, bias = float_at(scales, g), float_at(biases, g)
        _decode_group(packed, g * group, (g + 1) * group, bits, scale, bias, out)


@kernel
def compare(x, packed, scales, biases, bits, group, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x, (n,) raw weights, and what `decode` makes of the rest to `sums`: see compare.py."""
    step = tile_size(group)
    tile, totals = np.empty(step, np.float32), np.zeros(3, np.float64)
    for start in range(0, x.size, step):
        stop = min(start + step, x.size)
        own, decoded = slice(start // group, stop // group), tile[: stop - start]
        decode(packed[start * bits // 8 : stop * bits // 8], scales[own], biases[own], bits, group, decoded)
        add_pairs(x[start:stop], decoded, totals, sums)
