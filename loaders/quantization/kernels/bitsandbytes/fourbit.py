"""Four-bit codes of a sixteen-value table, as bitsandbytes stores them: NF4 and FP4.

A group's weights are divided by its largest magnitude, and each takes the nearest value of the table. The arithmetic is
that of bitsandbytes 0.50 on a CPU (bitsandbytes/backends/default/ops.py, quantize_4bit), bit by bit:
    v = clamp(x * fl(1 / max(absmax, 1e-38)), -1, 1) in float32
    rank = the number of midpoints of the sorted table strictly below v (NaN: all fifteen)
Two codes make a byte, the first in the high half. The weights of a last group that is not full are divided by absmax
rather than multiplied by its inverse, as in bitsandbytes.

NF4: Dettmers et al. 2023, QLoRA, arXiv:2305.14314. FP4's code is a sign, two exponent bits and one mantissa bit.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import thresholds
from loaders.quantization.kernels.bitsandbytes.tables import FP4, FP4_ORDER, NF4, NF4_ORDER, Table
from loaders.quantization.kernels.compare import Group, add_groups, add_slowly, settle, tile_size
from loaders.quantization.kernels.intrinsics import bf16_value
from loaders.quantization.kernels.lanes import F32, I8, I16, I32, Array, Lanes, Value, host_has, kernel, vector

STEP = 32  # weights coded at once, as float32
WIDE = 64  # bfloat16s coded at once, as 16-bit integers: see `encode_bf16`


# --- encoding


def _magnitude_bits(lanes: Lanes, x: Array, at: Value, count: int) -> Value:
    """Return the bits of the largest of `count` magnitudes, which sort as integers, NaN last."""
    bits = lanes.load(x, at, count)
    if x.element is F32:
        return lanes.reduce("umax", lanes.op("and_", lanes.b.bitcast(bits, ir.VectorType(I32, count)), 0x7FFFFFFF))
    return lanes.reduce("umax", lanes.op("and_", bits, 0x7FFF))


@vector(types.float32)
def _largest(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the largest of STEP magnitudes; it is NaN if one is."""
    bits = _magnitude_bits(lanes, x, at, STEP)
    if x.element is F32:
        return lanes.b.bitcast(bits, F32)
    one = lanes.splat(bits, 1)
    value = lanes.from_bf16(one) if x.holds == types.uint16 else lanes.from_f16(one)
    return lanes.b.extract_element(value, ir.Constant(I32, 0))


@vector(types.uint16)
def _largest_bits(lanes: Lanes, x: Array, at: Value) -> Value:
    """Return the bits of the largest of WIDE magnitudes of bfloat16."""
    return _magnitude_bits(lanes, x, at, WIDE)


def _pack(lanes: Lanes, ranks: Value, order: tuple[int, ...], packed: Array, at: Value) -> None:
    """Store the codes of int16 ranks, two to a byte, the first high, for the weights that begin at `at`."""
    codes = ranks
    if order != NF4_ORDER and host_has("avx512bw"):
        codes = lanes.lookup_16(lanes.const(ir.VectorType(I16, 16), order), ranks)
    elif order != NF4_ORDER:
        narrow = ir.VectorType(I8, ranks.type.count)
        chosen = lanes.choose([lanes.const(narrow, code) for code in order], lanes.b.trunc(ranks, narrow))
        codes = lanes.b.zext(chosen, ranks.type)
    lanes.store(lanes.nibbles(codes, first_high=True), packed, lanes.op("lshr", at, 1))


def _ranks_of_values(lanes: Lanes, x: Array, at: Value, inverse: Value, bounds: Array) -> Value:
    """Return the ranks of STEP weights times `inverse` among the bounds; a NaN ranks above all of them.

    Nothing needs to be clamped to [-1, 1], since all bounds lie inside.
    """
    limits, parts = lanes.entries(bounds, 15, 16), []
    for part in range(STEP // 16):
        values = lanes.floats(x, lanes.op("add", at, 16 * part), 16)
        parts.append(_search(lanes, lanes.b.fmul(values, lanes.splat(inverse, 16)), limits))
    return lanes.join(parts)


def _search(lanes: Lanes, values: Value, bounds: list[Value]) -> Value:
    """Count the bounds, of fifteen in rising order, below each lane, as int16: a binary search by selections."""
    pick = lanes.b.select

    def level(found: list[Value], middle: int, step: int) -> Value:
        """Return the bound to compare with next, after the comparisons `found`."""
        if not found:
            return bounds[middle]
        return pick(found[0], level(found[1:], middle + step, step // 2), level(found[1:], middle - step, step // 2))

    bits: list[Value] = []
    for _ in range(4):
        bits.append(lanes.b.fcmp_unordered(">", values, level(bits, 7, 4)))
    kind = ir.VectorType(I32, 16)
    rank = lanes.const(kind, 0)
    for weight, is_set in zip((8, 4, 2, 1), bits, strict=True):
        rank = lanes.b.or_(rank, pick(is_set, lanes.const(kind, weight), lanes.const(kind, 0)))
    return lanes.b.trunc(rank, ir.VectorType(I16, 16))


def _count(lanes: Lanes, values: Value, bounds: list[Value]) -> Value:
    """Return how many of the bounds each int16 lane is above: a comparison gives -1 there, which is subtracted."""
    total = lanes.const(values.type, 0)
    for bound in bounds:
        total = lanes.b.sub(total, lanes.b.sext(lanes.b.icmp_signed(">", values, bound), values.type))
    return total


@vector(types.void)
def _code_nf4(lanes: Lanes, x: Array, at: Value, inverse: Value, bounds: Array, packed: Array) -> None:
    _pack(lanes, _ranks_of_values(lanes, x, at, inverse, bounds), NF4_ORDER, packed, at)


@vector(types.void)
def _code_fp4(lanes: Lanes, x: Array, at: Value, inverse: Value, bounds: Array, packed: Array) -> None:
    _pack(lanes, _ranks_of_values(lanes, x, at, inverse, bounds), FP4_ORDER, packed, at)


def _code_bits(
    lanes: Lanes,
    order: tuple[int, ...],
    x: Array,
    start: Value,
    stop: Value,
    rows: Array,
    row: Value,
    directions: Array,
    exponents: Value,
    spare: Array,
    packed: Array,
) -> None:
    """Code the bfloat16s [start, stop) of a group, whose thresholds are rows[row] + directions * exponents."""
    zero = ir.Constant(row.type, 0)
    moved = lanes.b.mul(lanes.load(directions, zero, 16), lanes.splat(lanes.b.trunc(exponents, I16), 16))
    table = lanes.b.add(lanes.load(rows, lanes.op("shl", row, 4), 16), moved)
    if searches := host_has("avx512bw"):
        bounds = []
    else:  # broadcast from memory, which is cheaper than from a register
        lanes.store(table, spare, zero)
        bounds = lanes.entries(spare, 15, WIDE)

    def code(at: Value) -> list[Value]:
        bits = thresholds.sortable(lanes, x, at, WIDE)
        ranks = thresholds.ranks(lanes, bits, table) if searches else _count(lanes, bits, bounds)
        _pack(lanes, ranks, order, packed, at)
        return []

    lanes.fold(start, stop, WIDE, [], code)


@vector(types.void)
def _code_bits_nf4(
    lanes: Lanes,
    x: Array,
    start: Value,
    stop: Value,
    rows: Array,
    row: Value,
    directions: Array,
    exponents: Value,
    spare: Array,
    packed: Array,
) -> None:
    _code_bits(lanes, NF4_ORDER, x, start, stop, rows, row, directions, exponents, spare, packed)


@vector(types.void)
def _code_bits_fp4(
    lanes: Lanes,
    x: Array,
    start: Value,
    stop: Value,
    rows: Array,
    row: Value,
    directions: Array,
    exponents: Value,
    spare: Array,
    packed: Array,
) -> None:
    _code_bits(lanes, FP4_ORDER, x, start, stop, rows, row, directions, exponents, spare, packed)


@kernel
def _encode_group(x, start, group, bounds, is_fp4, packed):  # type: ignore[no-untyped-def]
    """Code one full group by the definition at the top of this file; return its largest magnitude."""
    top = np.float32(0)
    for at in range(start, start + group, STEP):
        largest = _largest(x, at)
        top = largest if largest > top or np.isnan(largest) else top
    inverse = np.float32(1) / (np.float32(1e-38) if top < np.float32(1e-38) else top)
    for at in range(start, start + group, STEP):
        if is_fp4:
            _code_fp4(x, at, inverse, bounds, packed)
        else:
            _code_nf4(x, at, inverse, bounds, packed)
    return top


@kernel
def encode(x, group, bounds, is_fp4, packed, absmax):  # type: ignore[no-untyped-def]
    """Code full groups of a multiple of STEP. x: (n,), n = len(absmax) * group; packed: uint8 (n / 2,)."""
    for g in range(absmax.size):
        absmax[g] = _encode_group(x, g * group, group, bounds, is_fp4, packed)


@kernel
def encode_bf16(x, group, bounds, is_fp4, rows, directions, lowest, highest, packed, absmax):  # type: ignore[no-untyped-def]
    """Code as `encode` does, for bfloat16 bits in groups of a multiple of WIDE, and give the same bytes.

    It compares the weights' own 16 bits with thresholds, so that twice as many fit a register as float32 products.
    """
    spare = np.empty(16, np.int16)
    for g in range(absmax.size):
        start = g * group
        top = np.uint16(0)
        for at in range(start, start + group, WIDE):
            top = max(top, _largest_bits(x, at))
        if top < lowest or top > highest:
            absmax[g] = _encode_group(x, start, group, bounds, is_fp4, packed)
            continue
        absmax[g] = bf16_value(top)
        # 0x3F80 are the bits of 1.0: what is left are the exponent's bits less 127.
        row, exponents = top & 127, (top & ~127) - 0x3F80
        if is_fp4:
            _code_bits_fp4(x, start, start + group, rows, row, directions, exponents, spare, packed)
        else:
            _code_bits_nf4(x, start, start + group, rows, row, directions, exponents, spare, packed)


@kernel
def group_absmax(x, group, absmax):  # type: ignore[no-untyped-def]
    """Find the largest magnitude of each full group. x: (n,), n = len(absmax) * group; absmax: float32."""
    for g in range(absmax.size):
        top = np.float32(0)
        for at in range(g * group, (g + 1) * group, STEP):
            largest = _largest(x, at)
            top = largest if largest > top or np.isnan(largest) else top
        absmax[g] = top


def encode_tail(values: np.ndarray, code: Table) -> tuple[np.ndarray, np.float32]:
    """Code a last group that is not full. values: float32 (m,), m > 0; returns uint8 (ceil(m / 2),) and absmax.

    As in bitsandbytes, the group is divided by its absmax, which is at least 1e-38, also as it is stored. An odd group
    is padded with a zero.
    """
    top = np.abs(values).max()
    top = top if np.isnan(top) else max(top, np.float32(1e-38))
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities are coded as torch codes them
        scaled = np.clip(values / top, np.float32(-1), np.float32(1))
    scaled = np.append(scaled, np.float32(0)) if scaled.size % 2 else scaled
    codes = code.order[np.searchsorted(code.bounds[:15], scaled, side="left")]
    return codes[::2] << 4 | codes[1::2], np.float32(top)


# --- decoding


def _pairs(lanes: Lanes, values: tuple[float, ...], packed: Array, at: Value, scale: Value) -> tuple[Value, Value]:
    """Return table[code] * scale of STEP weights, those at even places and those at odd ones."""
    count = STEP // 2
    codes = lanes.b.zext(lanes.load(packed, lanes.op("lshr", at, 1), count), ir.VectorType(I32, count))
    even, odd = (lanes.lookup(values, each) for each in (lanes.op("lshr", codes, 4), lanes.op("and_", codes, 15)))
    return lanes.b.fmul(even, scale), lanes.b.fmul(odd, scale)


def _decode_step(lanes: Lanes, values: tuple[float, ...], packed: Array, at: Value, scale: Value, out: Array) -> None:
    """Decode STEP weights by a table of sixteen values."""
    even, odd = _pairs(lanes, values, packed, at, lanes.splat(scale, STEP // 2))
    lanes.store(lanes.interleaved(even, odd), out, at)


def _add(
    lanes: Lanes,
    values: tuple[float, ...],
    x: Array,
    packed: Array,
    absmax: Array,
    group: Value,
    start: Value,
    stop: Value,
    totals: Array,
) -> Value:
    """Sum the differences of weights [start, stop) and their decoded codes: see `compare.add_groups`."""

    def of_group(g: Value) -> Group:
        return (lanes.splat(lanes.b.load(lanes.b.gep(absmax.data, [g])), STEP // 2),)

    def decoded(at: Value, own: Group) -> tuple[Value, Value]:
        return _pairs(lanes, values, packed, at, *own)

    return add_groups(lanes, x, start, stop, group, totals, of_group, decoded)


@vector(types.float64)
def _add_nf4(
    lanes: Lanes, x: Array, packed: Array, absmax: Array, group: Value, start: Value, stop: Value, totals: Array
) -> Value:
    return _add(lanes, NF4, x, packed, absmax, group, start, stop, totals)


@vector(types.float64)
def _add_fp4(
    lanes: Lanes, x: Array, packed: Array, absmax: Array, group: Value, start: Value, stop: Value, totals: Array
) -> Value:
    return _add(lanes, FP4, x, packed, absmax, group, start, stop, totals)


@vector(types.void)
def _decode_nf4(lanes: Lanes, packed: Array, at: Value, scale: Value, out: Array) -> None:
    _decode_step(lanes, NF4, packed, at, scale, out)


@vector(types.void)
def _decode_fp4(lanes: Lanes, packed: Array, at: Value, scale: Value, out: Array) -> None:
    _decode_step(lanes, FP4, packed, at, scale, out)


@kernel
def decode(packed, absmax, group, is_fp4, out):  # type: ignore[no-untyped-def]
    """Decode full groups: table[code] * absmax. packed: uint8 (n / 2,); absmax: float32 (n / group,); out: float32."""
    for g in range(absmax.size):
        for at in range(g * group, (g + 1) * group, STEP):
            if is_fp4:
                _decode_fp4(packed, at, absmax[g], out)
            else:
                _decode_nf4(packed, at, absmax[g], out)


@kernel
def compare(x, packed, absmax, group, is_fp4, sums):  # type: ignore[no-untyped-def]
    """Add the differences of x, (n,) raw weights, and what `decode` makes of the rest to `sums`: see compare.py."""
    step, totals = tile_size(group), np.zeros(3, np.float64)
    for start in range(0, x.size, step):
        stop = min(start + step, x.size)
        if is_fp4:
            largest = _add_fp4(x, packed, absmax, group, start, stop, totals)
        else:
            largest = _add_nf4(x, packed, absmax, group, start, stop, totals)
        if not settle(largest, totals, sums):
            decoded = np.empty(stop - start, np.float32)
            own = absmax[start // group : stop // group]
            decode(packed[start // 2 : stop // 2], own, group, is_fp4, decoded)
            add_slowly(x[start:stop], decoded, 0, stop - start, sums)


def decode_tail(packed: np.ndarray, absmax: np.float32, code: Table, out: np.ndarray) -> None:
    """Decode a last group that is not full: table[code] * absmax. packed: uint8 (ceil(m / 2),); out: float32 (m,)."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: out.size]
    out[:] = code.values[codes] * absmax
