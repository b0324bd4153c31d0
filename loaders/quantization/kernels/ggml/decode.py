"""Decoders of ggml's block formats to float32, as llama.cpp's dequantize_row_* (ggml/src/ggml-quants.c) compute them.

They share no code with the encoders, which they check. data: uint8, whole blocks; out: float32, their weights. What the
bytes of a block mean is described in kernels/ggml/blocks.py and mxfp4.py; blocks of 256 weights are in super_blocks.py.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.ggml import fields, iq4_decode
from loaders.quantization.kernels.ggml import super_blocks as k
from loaders.quantization.kernels.lanes import F32, I32, Array, Lanes, Value, kernel, vector


def _nibbles(lanes: Lanes, data: Array, at: Value, offset: int) -> tuple[Value, Value]:
    """Return the 16 low nibbles and the 16 high ones of 16 bytes: the first and the second half of a block."""
    codes = fields.integers(lanes, fields.load_bytes(lanes, data, at, offset, 16))
    return lanes.op("and_", codes, 15), lanes.op("lshr", codes, 4)


def _with_fifth(lanes: Lanes, data: Array, at: Value, offset: int, halves: tuple[Value, Value]) -> list[Value]:
    """Add the fifth bits to the nibbles of a block's halves: bit i of the uint32 at `offset` belongs to weight i."""
    raw = fields.load_bytes(lanes, data, at, offset, 4)
    word = lanes.splat(lanes.b.bitcast(raw, I32), 16)
    found = []
    for part, low in enumerate(halves):
        bits = lanes.b.lshr(word, lanes.const(word.type, range(16 * part, 16 * part + 16)))
        found.append(lanes.b.or_(low, lanes.op("shl", lanes.op("and_", bits, 1), 4)))
    return found


# The weights of a block by the byte `at` which it begins, sixteen to a vector.


def eight(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q8_0."""
    scale, kind = fields.half(lanes, data, at, 0), ir.VectorType(I32, 16)
    halves = (fields.load_bytes(lanes, data, at, 2 + 16 * part, 16) for part in range(2))
    return [fields.scaled(lanes, lanes.b.sext(raw, kind), scale) for raw in halves]


def four_centred(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q4_0."""
    scale = fields.half(lanes, data, at, 0)
    return [fields.scaled(lanes, lanes.op("sub", codes, 8), scale) for codes in _nibbles(lanes, data, at, 2)]


def four_offset(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q4_1."""
    scale, low = fields.half(lanes, data, at, 0), fields.half(lanes, data, at, 2)
    return [lanes.b.fadd(fields.scaled(lanes, codes, scale), low) for codes in _nibbles(lanes, data, at, 4)]


def five_centred(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q5_0."""
    scale, codes = fields.half(lanes, data, at, 0), _with_fifth(lanes, data, at, 2, _nibbles(lanes, data, at, 6))
    return [fields.scaled(lanes, lanes.op("sub", each, 16), scale) for each in codes]


def five_offset(lanes: Lanes, data: Array, at: Value) -> list[Value]:
    """Return the 32 weights of a block of Q5_1."""
    scale, low = fields.half(lanes, data, at, 0), fields.half(lanes, data, at, 2)
    codes = _with_fifth(lanes, data, at, 4, _nibbles(lanes, data, at, 8))
    return [lanes.b.fadd(fields.scaled(lanes, each, scale), low) for each in codes]


@vector(types.void)
def _eight(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    fields.put(lanes, eight(lanes, data, at), out, to)


@vector(types.void)
def _four_centred(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    fields.put(lanes, four_centred(lanes, data, at), out, to)


@vector(types.void)
def _four_offset(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    fields.put(lanes, four_offset(lanes, data, at), out, to)


@vector(types.void)
def _five_centred(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    fields.put(lanes, five_centred(lanes, data, at), out, to)


@vector(types.void)
def _five_offset(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    fields.put(lanes, five_offset(lanes, data, at), out, to)


@kernel
def q8_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _eight(data, b * 34, out, b * 32)


@kernel
def q4_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _four_centred(data, b * 18, out, b * 32)


@kernel
def q4_1(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _four_offset(data, b * 20, out, b * 32)


@kernel
def q5_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _five_centred(data, b * 22, out, b * 32)


@kernel
def q5_1(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 32):
        _five_offset(data, b * 24, out, b * 32)


E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled, as in ggml


def scale_of_mxfp4(lanes: Lanes, data: Array, at: Value) -> Value:
    """Return sixteen lanes of a block's scale, which is halved as codes are doubled: 2^(byte - 128).

    Below 2^-126 that is a subnormal float32.
    """
    byte = lanes.b.zext(lanes.b.load(data.pointer(at, data.element), align=1), I32)
    normal = lanes.op("shl", lanes.op("sub", byte, 1), 23)
    small = lanes.b.shl(ir.Constant(I32, 0x200000), lanes.op("and_", byte, 1))
    is_normal = lanes.b.icmp_signed(">", byte, ir.Constant(I32, 1))
    return lanes.splat(lanes.b.bitcast(lanes.b.select(is_normal, normal, small), F32), 16)


def four_floating(lanes: Lanes, data: Array, at: Value, scale: Value) -> list[Value]:
    """Return the 32 weights of a block of MXFP4 of a known scale."""
    return [lanes.b.fmul(lanes.lookup(E2M1, codes), scale) for codes in _nibbles(lanes, data, at, 1)]


@vector(types.void)
def _four_floating(lanes: Lanes, data: Array, at: Value, out: Array, to: Value) -> None:
    fields.put(lanes, four_floating(lanes, data, at, scale_of_mxfp4(lanes, data, at)), out, to)


@kernel
def mxfp4(data, out):  # type: ignore[no-untyped-def]
    """Decode MXFP4 by doubled codes and halved scales, as ggml. An exponent byte of 255 is 2^128 there, and not NaN."""
    for b in range(out.size // 32):
        _four_floating(data, b * 17, out, b * 32)


DECODERS = {
    "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "MXFP4": mxfp4, "Q2_K": k.q2_k,
    "Q3_K": k.q3_k, "Q4_K": k.q4_k, "Q5_K": k.q5_k, "Q6_K": k.q6_k, "TQ1_0": k.tq1_0, "TQ2_0": k.tq2_0,
    "IQ4_NL": iq4_decode.iq4_nl, "IQ4_XS": iq4_decode.iq4_xs,
}  # fmt: skip
