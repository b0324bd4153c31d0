"""Four-bit codes of a sixteen-value table, as bitsandbytes stores them: NF4 and FP4.

A group's weights are divided by its largest magnitude and each takes the table's nearest value. The arithmetic is that
of bitsandbytes 0.50 on a CPU (bitsandbytes/backends/default/ops.py, quantize_4bit), bit by bit:
    v = clamp(x * fl(1 / max(absmax, 1e-38)), -1, 1) in float32
    rank = how many midpoints of the sorted table lie strictly below v (NaN: all fifteen)
and two codes make a byte, the first in the high half. A last group that is not full is divided, not multiplied.

NF4: Dettmers et al. 2023, QLoRA, arXiv:2305.14314. FP4's code is a sign, two exponent bits and one mantissa bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F32, I8, I16, I32, Array, Lanes, Value, bf16_value, kernel, vector

STEP = 32  # weights coded at once
WIDE = 64  # bfloat16s coded at once, by their bits

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4 = (*_FP4, 0.0, *(-value for value in _FP4[1:]))
# rank -> code; FP4's is torch.argsort(FP4), its two zeros as bitsandbytes meets them
NF4_ORDER = tuple(range(16))
FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


@dataclass(frozen=True, eq=False)
class Table:
    """A sixteen-value code.

    values: float32 (16,), by code. bounds: float32 (16,), the fifteen midpoints in rising order and a spare.
    order: uint8 (16,), rank -> code.
    rows, directions, lowest, highest: bounds for bfloat16 bits, see `_thresholds`; they hold for magnitudes whose bits
    lie in [lowest, highest].
    """

    name: str
    values: np.ndarray
    bounds: np.ndarray
    order: np.ndarray
    rows: np.ndarray
    directions: np.ndarray
    lowest: int
    highest: int


@cache
def table(name: str) -> Table:
    """The table called "nf4" or "fp4"."""
    values = np.array({"nf4": NF4, "fp4": FP4}[name], np.float32)
    order = np.array(NF4_ORDER if name == "nf4" else FP4_ORDER, np.uint8)
    ranked = values[order]
    bounds = ((ranked[:-1] + ranked[1:]) / np.float32(2)).astype(np.float32)
    # A bound at zero (FP4) tells the least positive weight from zero: its product must not round to zero.
    highest = 0x4780 if 0.0 in bounds else 0x7E00  # 2^16, 2^125
    return Table(
        name,
        values,
        np.append(bounds, np.float32(3e38)).astype(np.float32),
        order,
        _thresholds(bounds),
        np.append(np.sign(bounds), 0).astype(np.int16),
        0x0D80,  # 2^-100
        highest,
    )


def _thresholds(bounds: np.ndarray) -> np.ndarray:
    """The bounds among bfloat16 bits: int16 (128, 16), a row for each mantissa of the group's largest magnitude.

    fl(x * inv) rises with x, so "above bound i" is exactly "above the last x whose product is not", and bfloat16s sort
    as the integers `_sortable` makes of them. Row m is worked out for a largest magnitude of 1 + m/128; for another
    exponent the thresholds move by whole exponents: away from zero by (exponent - 127) << 7, their direction's way.
    """
    sortable = np.arange(-32768, 32768).astype(np.int16)
    bits = np.where(sortable < 0, sortable ^ 0x7FFF, sortable).astype(np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    near = np.abs(values) <= 2
    rows = np.full((128, 16), 0x7FFF, np.int16)
    for mantissa in range(128):
        inverse = np.float32(1) / np.float32(1 + mantissa / 128)
        last = np.searchsorted(values[near] * inverse, bounds, side="right") - 1
        rows[mantissa, :15] = sortable[near][last]
    return rows


# --- encoding


def _magnitude_bits(lanes: Lanes, x: Array, at: Value, count: int) -> Value:
    """The bits of the largest of `count` magnitudes: they sort as integers, NaN last."""
    bits = lanes.load(x, at, count)
    if x.element is F32:
        return lanes.reduce("umax", lanes.op("and_", lanes.b.bitcast(bits, ir.VectorType(I32, count)), 0x7FFFFFFF))
    return lanes.reduce("umax", lanes.op("and_", bits, 0x7FFF))


@vector(types.float32)
def _largest(lanes: Lanes, x: Array, at: Value) -> Value:
    """The largest of STEP magnitudes, NaN if there is one."""
    bits = _magnitude_bits(lanes, x, at, STEP)
    if x.element is F32:
        return lanes.b.bitcast(bits, F32)
    one = lanes.splat(bits, 1)
    value = lanes.from_bf16(one) if x.holds == types.uint16 else lanes.from_f16(one)
    return lanes.b.extract_element(value, ir.Constant(I32, 0))


@vector(types.uint16)
def _largest_bits(lanes: Lanes, x: Array, at: Value) -> Value:
    return _magnitude_bits(lanes, x, at, WIDE)


def _pack(lanes: Lanes, ranks: Value, order: tuple[int, ...], packed: Array, at: Value) -> None:
    """Ranks (int16) to codes, two to a byte, the first high, for the weights that begin at `at`."""
    codes, half = ranks, ranks.type.count // 2
    if order != NF4_ORDER:
        narrow = ir.VectorType(I8, ranks.type.count)
        chosen = lanes.choose([lanes.const(narrow, code) for code in order], lanes.b.trunc(ranks, narrow))
        codes = lanes.b.zext(chosen, ranks.type)
    pairs = lanes.b.bitcast(codes, ir.VectorType(I32, half))
    both = lanes.b.or_(lanes.op("shl", pairs, 4), lanes.op("lshr", pairs, 16))
    lanes.store(lanes.b.trunc(both, ir.VectorType(I8, half)), packed, lanes.op("lshr", at, 1))


def _ranks_of_values(lanes: Lanes, x: Array, at: Value, inverse: Value, bounds: Array) -> Value:
    """Ranks of STEP weights times `inverse` among the bounds, NaN above them all.

    Nothing needs to be clamped: all bounds lie inside (-1, 1).
    """
    limits, parts = lanes.entries(bounds, 15, 16), []
    for part in range(STEP // 16):
        values = lanes.floats(x, lanes.op("add", at, 16 * part), 16)
        parts.append(_search(lanes, lanes.b.fmul(values, lanes.splat(inverse, 16)), limits))
    return lanes.join(parts)


def _search(lanes: Lanes, values: Value, bounds: list[Value]) -> Value:
    """How many of fifteen rising bounds lie below each lane, as int16: a binary search by selections."""
    pick = lanes.b.select

    def level(found: list[Value], middle: int, step: int) -> Value:
        """The bound to compare with next, after the comparisons so far."""
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


def _ranks_of_bits(lanes: Lanes, x: Array, at: Value, thresholds: Array) -> Value:
    """Ranks of WIDE bfloat16s among the group's thresholds: all of them 16-bit integers, every comparison counted."""
    kind = ir.VectorType(I16, WIDE)
    bits = lanes.load(x, at, WIDE)
    sortable = lanes.b.xor(bits, lanes.op("and_", lanes.op("ashr", bits, 15), 0x7FFF))
    total = lanes.const(kind, 0)
    for bound in lanes.entries(thresholds, 15, WIDE):
        total = lanes.b.sub(total, lanes.b.sext(lanes.b.icmp_signed(">", sortable, bound), kind))
    return total


@vector(types.void)
def _code_nf4(lanes: Lanes, x: Array, at: Value, inverse: Value, bounds: Array, packed: Array) -> None:
    _pack(lanes, _ranks_of_values(lanes, x, at, inverse, bounds), NF4_ORDER, packed, at)


@vector(types.void)
def _code_fp4(lanes: Lanes, x: Array, at: Value, inverse: Value, bounds: Array, packed: Array) -> None:
    _pack(lanes, _ranks_of_values(lanes, x, at, inverse, bounds), FP4_ORDER, packed, at)


@vector(types.void)
def _code_bits_nf4(lanes: Lanes, x: Array, at: Value, thresholds: Array, packed: Array) -> None:
    _pack(lanes, _ranks_of_bits(lanes, x, at, thresholds), NF4_ORDER, packed, at)


@vector(types.void)
def _code_bits_fp4(lanes: Lanes, x: Array, at: Value, thresholds: Array, packed: Array) -> None:
    _pack(lanes, _ranks_of_bits(lanes, x, at, thresholds), FP4_ORDER, packed, at)


@vector(types.void)
def _move_thresholds(
    lanes: Lanes, rows: Array, row: Value, directions: Array, exponents: Value, thresholds: Array
) -> None:
    """Thresholds = rows[row] + directions * exponents, sixteen int16."""
    zero = ir.Constant(row.type, 0)
    moved = lanes.b.mul(lanes.load(directions, zero, 16), lanes.splat(lanes.b.trunc(exponents, I16), 16))
    lanes.store(lanes.b.add(lanes.load(rows, lanes.op("shl", row, 4), 16), moved), thresholds, zero)


@kernel
def _encode_group(x, start, group, bounds, is_fp4, packed):  # type: ignore[no-untyped-def]
    """One full group by the definition above; returns its largest magnitude."""
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
    """Code full groups. x: (n,), n = len(absmax) * group; packed: uint8 (n / 2,); absmax: float32."""
    for g in range(absmax.size):
        absmax[g] = _encode_group(x, g * group, group, bounds, is_fp4, packed)


@kernel
def encode_bf16(x, group, bounds, is_fp4, rows, directions, lowest, highest, packed, absmax):  # type: ignore[no-untyped-def]
    """`encode` for bfloat16 bits in groups of a multiple of WIDE: the same bytes, twice as many weights at once."""
    thresholds = np.empty(16, np.int16)
    for g in range(absmax.size):
        start = g * group
        top = np.uint16(0)
        for at in range(start, start + group, WIDE):
            top = max(top, _largest_bits(x, at))
        if top < lowest or top > highest:
            absmax[g] = _encode_group(x, start, group, bounds, is_fp4, packed)
            continue
        absmax[g] = bf16_value(top)
        _move_thresholds(rows, top & 127, directions, (top & ~127) - 0x3F80, thresholds)
        for at in range(start, start + group, WIDE):
            if is_fp4:
                _code_bits_fp4(x, at, thresholds, packed)
            else:
                _code_bits_nf4(x, at, thresholds, packed)


@kernel
def group_absmax(x, group, absmax):  # type: ignore[no-untyped-def]
    """The largest magnitude of each full group. x: (n,), n = len(absmax) * group; absmax: float32."""
    for g in range(absmax.size):
        top = np.float32(0)
        for at in range(g * group, (g + 1) * group, STEP):
            largest = _largest(x, at)
            top = largest if largest > top or np.isnan(largest) else top
        absmax[g] = top


def encode_tail(values: np.ndarray, code: Table) -> tuple[np.ndarray, np.float32]:
    """A last group that is not full. values: float32 (m,), m > 0; returns uint8 (ceil(m / 2),) and its absmax.

    It is divided by its absmax, which is at least 1e-38, also as stored; an odd one is padded with a zero.
    """
    top = np.abs(values).max()
    top = top if np.isnan(top) else max(top, np.float32(1e-38))
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.clip(values / top, np.float32(-1), np.float32(1))
    scaled = np.append(scaled, np.float32(0)) if scaled.size % 2 else scaled
    codes = code.order[np.searchsorted(code.bounds[:15], scaled, side="left")]
    return codes[::2] << 4 | codes[1::2], np.float32(top)


# --- decoding


def _decode_step(lanes: Lanes, values: tuple[float, ...], packed: Array, at: Value, scale: Value, out: Array) -> None:
    count = STEP // 2
    wide = lanes.b.zext(lanes.load(packed, lanes.op("lshr", at, 1), count), ir.VectorType(I16, count))
    pairs = lanes.b.or_(lanes.op("lshr", wide, 4), lanes.op("shl", lanes.op("and_", wide, 15), 8))
    codes = lanes.b.bitcast(pairs, ir.VectorType(I8, STEP))
    for half in range(STEP // 16):
        index = lanes.b.zext(lanes.part(codes, half, 16), ir.VectorType(I32, 16))
        lanes.store(
            lanes.b.fmul(lanes.lookup(values, index), lanes.splat(scale, 16)), out, lanes.op("add", at, 16 * half)
        )


@vector(types.void)
def _decode_nf4(lanes: Lanes, packed: Array, at: Value, scale: Value, out: Array) -> None:
    _decode_step(lanes, NF4, packed, at, scale, out)


@vector(types.void)
def _decode_fp4(lanes: Lanes, packed: Array, at: Value, scale: Value, out: Array) -> None:
    _decode_step(lanes, FP4, packed, at, scale, out)


@kernel
def decode(packed, absmax, group, is_fp4, out):  # type: ignore[no-untyped-def]
    """table[code] * absmax of full groups. packed: uint8 (n / 2,); absmax: float32 (n / group,); out: float32 (n,)."""
    for g in range(absmax.size):
        for at in range(g * group, (g + 1) * group, STEP):
            if is_fp4:
                _decode_fp4(packed, at, absmax[g], out)
            else:
                _decode_nf4(packed, at, absmax[g], out)


def decode_tail(packed: np.ndarray, absmax: np.float32, code: Table, out: np.ndarray) -> None:
    """table[code] * absmax of a last group that is not full. packed: uint8 (ceil(m / 2),); out: float32 (m,)."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: out.size]
    out[:] = code.values[codes] * absmax
