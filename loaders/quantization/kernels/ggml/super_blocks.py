"""Super-blocks of 256 weights of ggml's K-quants and ternary types, decoded into registers.

They come out as dequantize_row_* (llama.cpp, ggml/src/ggml-quants.c) compute them, and share no code with the encoders,
which they check. What the bytes mean is described in kernels/ggml/k_quants.py and ternary.py. data: uint8, whole
blocks; out: float32, their weights.

A weight is code * scale - minimum. Sub-blocks of 16 or 32 weights have a scale each, and in Q2_K, Q4_K and Q5_K a
minimum; the ternary types have one scale for all. Each type is a function that returns the scales and minima of the
super-block that begins at a byte, and one that returns its codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.ggml import fields
from loaders.quantization.kernels.lanes import F32, I32, Array, Lanes, Value, kernel, vector

SUPER, PART = 256, 16  # weights in a super-block, and in a vector
Scales = tuple[Value, Value | None]  # float32 lanes: scales, and minima if there are any


@dataclass(frozen=True)
class SuperBlock:
    """A type: the bytes of a super-block, its scales and its codes, the least and the greatest of these.

    `scales` gives a lane for each sub-block, or sixteen equal ones; `codes` gives sixteen vectors of sixteen int32.
    """

    size: int
    scales: Callable[[Lanes, Array, Value], Scales]
    codes: Callable[[Lanes, Array, Value], list[Value]]
    least: int
    top: int

    def weights(self, lanes: Lanes, data: Array, at: Value, scales: Scales) -> list[Value]:
        """Return the weights of the super-block at byte `at`, whose scales are known: sixteen vectors of sixteen."""
        scale, minimum = scales
        found = []
        for part, codes in enumerate(self.codes(lanes, data, at)):
            values = fields.scaled(lanes, codes, of_part(lanes, scale, part))
            found.append(values if minimum is None else lanes.b.fsub(values, of_part(lanes, minimum, part)))
        return found


def of_part(lanes: Lanes, values: Value, part: int) -> Value:
    """Return sixteen lanes of what a value for each sub-block is for the weights [16 * part, 16 * (part + 1))."""
    return lanes.shuffle(values, [part * values.type.count // PART] * PART)


def _floats(lanes: Lanes, integers: Value) -> Value:
    return lanes.b.sitofp(integers, ir.VectorType(F32, integers.type.count))


def _field(lanes: Lanes, data: Array, at: Value, offset: int, count: int = PART) -> Value:
    """Return `count` bytes as int32 lanes."""
    return fields.integers(lanes, fields.load_bytes(lanes, data, at, offset, count))


def _bits(lanes: Lanes, values: Value, shift: int, mask: int) -> Value:
    return lanes.op("and_", lanes.op("lshr", values, shift), mask)


def _with_top(lanes: Lanes, low: Value, top: Value, places: int) -> Value:
    """Put the bits `top` above those of `low`, which has `places` of them."""
    return lanes.b.or_(low, lanes.op("shl", top, places))


def _two(lanes: Lanes, data: Array, at: Value, offset: int) -> list[Value]:
    """Return the two-bit fields of 64 bytes: four of a byte belong to weights 32 apart, of each half of the weights."""
    found = []
    for half in range(2):
        raw = [_field(lanes, data, at, offset + 32 * half + PART * part) for part in range(2)]
        found += [_bits(lanes, each, shift, 3) for shift in range(0, 8, 2) for each in raw]
    return found


def _four(lanes: Lanes, data: Array, at: Value, offset: int, line: int) -> list[Value]:
    """Return the nibbles of 128 bytes: those of a byte belong to weights `line` apart, of each 2 * `line` weights."""
    found = []
    for first in range(offset, offset + SUPER // 2, line):
        raw = [_field(lanes, data, at, first + place) for place in range(0, line, PART)]
        found += [_bits(lanes, each, shift, 15) for shift in (0, 4) for each in raw]
    return found


def _scales_q2_k(lanes: Lanes, data: Array, at: Value) -> Scales:
    both = _field(lanes, data, at, 0)
    scales, minima = _floats(lanes, _bits(lanes, both, 0, 15)), _floats(lanes, _bits(lanes, both, 4, 15))
    d, dmin = (fields.half(lanes, data, at, offset) for offset in (80, 82))
    return lanes.b.fmul(d, scales), lanes.b.fmul(dmin, minima)


def _codes_q2_k(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    return _two(lanes, data, at, 16)


def _scales_q3_k(lanes: Lanes, data: Array, at: Value) -> Scales:
    """Return d times six-bit integers less 32: nibbles of eight bytes, and two bits above each of four bytes more."""
    raw, tops = _field(lanes, data, at, 96, 8), lanes.shuffle(_field(lanes, data, at, 104, 4), [0, 1, 2, 3] * 4)
    nibbles = lanes.join([_bits(lanes, raw, shift, 15) for shift in (0, 4)])
    shifts = lanes.const(tops.type, [2 * (lane // 4) for lane in range(PART)])
    top = lanes.op("and_", lanes.b.lshr(tops, shifts), 3)
    integers = lanes.op("sub", _with_top(lanes, nibbles, top, 4), 32)
    return lanes.b.fmul(fields.half(lanes, data, at, 108), _floats(lanes, integers)), None


def _codes_q3_k(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the codes of Q3_K, less 4: a byte of the first 32 holds the third bits of eight weights, 32 apart."""
    thirds = [_field(lanes, data, at, PART * part) for part in range(2)]
    top = [_bits(lanes, each, shift, 1) for shift in range(8) for each in thirds]
    low = _two(lanes, data, at, 32)
    return [lanes.op("sub", _with_top(lanes, a, b, 2), 4) for a, b in zip(low, top, strict=True)]


def _six_bits(lanes: Lanes, data: Array, at: Value) -> Scales:
    """Return the scales and minima of Q4_K and Q5_K, by ggml's get_scale_min_k4: six-bit integers in twelve bytes.

    The first four scales and minima are the lower six bits of a byte each. Those of the others are a nibble of the last
    four bytes, and above it the upper two bits of the first four scales' bytes or minima's.
    """
    first, second, third = (_field(lanes, data, at, offset, 4) for offset in (4, 8, 12))
    low = [_bits(lanes, each, 0, 63) for each in (first, second)]
    nibbles = (_bits(lanes, third, shift, 15) for shift in (0, 4))
    high = [_with_top(lanes, a, _bits(lanes, b, 6, 3), 4) for a, b in zip(nibbles, (first, second), strict=True)]
    scales, minima = (_floats(lanes, lanes.join(each)) for each in zip(low, high, strict=True))
    d, dmin = (lanes.part(fields.half(lanes, data, at, offset), 0, 8) for offset in (0, 2))
    return lanes.b.fmul(d, scales), lanes.b.fmul(dmin, minima)


def _codes_q4_k(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    return _four(lanes, data, at, 16, 32)


def _codes_q5_k(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the codes of Q5_K: a byte of 32 holds the fifth bits of eight weights, 32 apart."""
    fifths = [_field(lanes, data, at, 16 + PART * part) for part in range(2)]
    top = [_bits(lanes, each, shift, 1) for shift in range(8) for each in fifths]
    return [_with_top(lanes, a, b, 4) for a, b in zip(_four(lanes, data, at, 48, 32), top, strict=True)]


def _scales_q6_k(lanes: Lanes, data: Array, at: Value) -> Scales:
    integers = lanes.b.sext(fields.load_bytes(lanes, data, at, 192, PART), ir.VectorType(I32, PART))
    return lanes.b.fmul(fields.half(lanes, data, at, 208), _floats(lanes, integers)), None


def _codes_q6_k(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    pairs = zip(_four(lanes, data, at, 0, 64), _two(lanes, data, at, 128), strict=True)
    return [lanes.op("sub", _with_top(lanes, low, top, 4), 32) for low, top in pairs]


def _scale_tq1_0(lanes: Lanes, data: Array, at: Value) -> Scales:
    return fields.half(lanes, data, at, 52), None


def _trits(lanes: Lanes, fractions: Value, count: int) -> list[Value]:
    """Return the first `count` trits of bytes, less 1: times 3, a fraction of 256 carries its next trit out."""
    found = []
    for _ in range(count):
        carried = lanes.op("mul", fractions, 3)
        found.append(lanes.op("sub", lanes.op("lshr", carried, 8), 1))
        fractions = lanes.op("and_", carried, 255)
    return found


def _codes_tq1_0(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the trits of TQ1_0, less 1: five of weights 32 apart, then five 16 apart, and at last four 4 apart."""
    first, second, third = (_trits(lanes, _field(lanes, data, at, PART * part), 5) for part in range(3))
    wide = [trits for pair in zip(first, second, strict=True) for trits in pair]
    return [*wide, *third, lanes.join(_trits(lanes, _field(lanes, data, at, 48, 4), 4))]


def _scale_tq2_0(lanes: Lanes, data: Array, at: Value) -> Scales:
    return fields.half(lanes, data, at, 64), None


def _codes_tq2_0(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    return [lanes.op("sub", codes, 1) for codes in _two(lanes, data, at, 0)]


Q2_K = SuperBlock(84, _scales_q2_k, _codes_q2_k, 0, 3)
Q3_K = SuperBlock(110, _scales_q3_k, _codes_q3_k, -4, 3)
Q4_K = SuperBlock(144, _six_bits, _codes_q4_k, 0, 15)
Q5_K = SuperBlock(176, _six_bits, _codes_q5_k, 0, 31)
Q6_K = SuperBlock(210, _scales_q6_k, _codes_q6_k, -32, 31)
TQ1_0 = SuperBlock(54, _scale_tq1_0, _codes_tq1_0, -1, 1)
TQ2_0 = SuperBlock(66, _scale_tq2_0, _codes_tq2_0, -1, 1)


def _decoder(block: SuperBlock) -> Callable[..., None]:
    """Return what decodes the super-block of a type that begins at byte `at` to `out`, from weight `to` on."""

    @vector(types.void)
    def decode(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
        fields.put(lanes, block.weights(lanes, data, at, block.scales(lanes, data, at)), out, to)

    return decode  # type: ignore[no-any-return]


_q2_k, _q3_k, _q4_k, _q5_k, _q6_k = (_decoder(block) for block in (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K))
_tq1_0, _tq2_0 = (_decoder(block) for block in (TQ1_0, TQ2_0))


@kernel
def q2_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        _q2_k(data, b * 84, out, b * 256)


@kernel
def q3_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        _q3_k(data, b * 110, out, b * 256)


@kernel
def q4_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        _q4_k(data, b * 144, out, b * 256)


@kernel
def q5_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        _q5_k(data, b * 176, out, b * 256)


@kernel
def q6_k(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        _q6_k(data, b * 210, out, b * 256)


@kernel
def tq1_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        _tq1_0(data, b * 54, out, b * 256)


@kernel
def tq2_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 256):
        _tq2_0(data, b * 66, out, b * 256)
