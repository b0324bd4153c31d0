"""Integer codes by group or by row, as compressed-tensors computes them: every step in the dtype of the weights.

Symmetric:  scale = amax / ((2^bits - 1) / 2);  code = clamp(round(w / scale), -2^(bits-1), 2^(bits-1) - 1)
Asymmetric, four bits:  low = min(w, 0), high = max(w, 0);  scale = (high - low) / 15;
    zero = round(clamp(-8 - low / scale, -8, 7));  code = clamp(round(w / scale + zero), -8, 7)
A scale of zero becomes the dtype's eps, and the zero of a group of zeros is 0 (compressed_tensors 0.20,
quantization/utils/helpers.py, calculate_qparams; quantization/lifecycle/forward_helpers.py, _quantize).

Packed, a code is stored plus 2^(bits-1), the first in a little-endian word's lowest bits: nibbles or bytes in order.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels import narrow
from loaders.quantization.kernels.lanes import F32, I32, Array, Lanes, Value, kernel, vector
from loaders.quantization.kernels.narrow import (
    float_of_bits,
    quotient_like,
    rounded_like,
    top_bits_1,
    top_bits_32,
)

STEP = 32


def _quotients(lanes: Lanes, x: Array, at: Value, scale: Value, count: int) -> Value:
    return narrow.like(lanes, x, lanes.b.fdiv(lanes.floats(x, at, count), lanes.splat(scale, count)))


def _code(lanes: Lanes, x: Array, at: Value, scale: Value, bits: int, count: int) -> Value:
    half = 1 << (bits - 1)
    return narrow.to_integers(lanes, _quotients(lanes, x, at, scale, count), -half, half - 1)


@vector(types.void)
def _pack_4(lanes: Lanes, x: Array, at: Value, scale: Value, packed: Array) -> None:
    codes = lanes.op("add", _code(lanes, x, at, scale, 4, STEP), 8)
    narrow.store_nibbles(lanes, codes, packed, lanes.op("lshr", at, 1))


@vector(types.void)
def _pack_8(lanes: Lanes, x: Array, at: Value, scale: Value, packed: Array) -> None:
    narrow.store_bytes(lanes, lanes.op("add", _code(lanes, x, at, scale, 8, STEP), 128), packed, at)


@vector(types.void)
def _pack_zero(lanes: Lanes, x: Array, at: Value, scale: Value, zero: Value, packed: Array) -> None:
    shifted = lanes.b.fadd(_quotients(lanes, x, at, scale, STEP), lanes.splat(zero, STEP))
    codes = narrow.to_integers(lanes, narrow.like(lanes, x, shifted), -8, 7)
    narrow.store_nibbles(lanes, lanes.op("add", codes, 8), packed, lanes.op("lshr", at, 1))


@vector(types.void)
def _plain_8(lanes: Lanes, x: Array, at: Value, scale: Value, out: Array) -> None:
    narrow.store_bytes(lanes, _code(lanes, x, at, scale, 8, STEP), out, at)


@vector(types.void)
def _plain_8_one(lanes: Lanes, x: Array, at: Value, scale: Value, out: Array) -> None:
    narrow.store_bytes(lanes, _code(lanes, x, at, scale, 8, 1), out, at)


def _end(lanes: Lanes, x: Array, at: Value, name: str) -> Value:
    """The largest or smallest of STEP weights, as an int32 that sorts like the float."""
    bits = lanes.load(x, at, STEP)
    if x.element is F32:
        wide = lanes.b.bitcast(bits, ir.VectorType(I32, STEP))
        return lanes.reduce(name, lanes.b.xor(wide, lanes.op("and_", lanes.op("ashr", wide, 31), 0x7FFFFFFF)))
    sortable = lanes.b.xor(bits, lanes.op("and_", lanes.op("ashr", bits, 15), 0x7FFF))
    return lanes.b.sext(lanes.reduce(name, sortable), I32)


@vector(types.int32)
def _highest(lanes: Lanes, x: Array, at: Value) -> Value:
    return _end(lanes, x, at, "smax")


@vector(types.int32)
def _lowest(lanes: Lanes, x: Array, at: Value) -> Value:
    return _end(lanes, x, at, "smin")


@kernel
def encode(x, group, bits, eps, packed, scales):  # type: ignore[no-untyped-def]
    """Symmetric codes of four or eight bits, packed. x: (n,) in groups of a multiple of STEP; packed: uint8; scales:
    float32 (n / group,), rounded to the dtype of x.
    """
    half = np.float32(7.5) if bits == 4 else np.float32(127.5)
    for g in range(scales.size):
        start = g * group
        top = np.uint32(0)
        for at in range(start, start + group, STEP):
            top = max(top, top_bits_32(x, at))
        scale = quotient_like(x, float_of_bits(x, top), half)
        scale = eps if scale == 0 else scale
        scales[g] = scale
        if bits == 4:
            for at in range(start, start + group, STEP):
                _pack_4(x, at, scale, packed)
        else:
            for at in range(start, start + group, STEP):
                _pack_8(x, at, scale, packed)


@kernel
def encode_zero(x, group, eps, packed, scales, zeros):  # type: ignore[no-untyped-def]
    """Asymmetric codes of four bits. zeros: int8 (n / group,), -8 to 7; the rest as in `encode`."""
    for g in range(scales.size):
        start = g * group
        low, high = np.int32(0), np.int32(0)
        for at in range(start, start + group, STEP):
            low = min(low, _lowest(x, at))
            high = max(high, _highest(x, at))
        # a negative number's magnitude has the bits ~sortable, a positive one's are its own
        smallest = -float_of_bits(x, np.uint32(~low)) if low < 0 else np.float32(0)
        scale = quotient_like(x, rounded_like(x, float_of_bits(x, np.uint32(high)) - smallest), np.float32(15))
        zero = rounded_like(x, np.float32(-8) - quotient_like(x, smallest, scale))
        zero = np.float32(0) if np.isnan(zero) else np.rint(min(max(zero, np.float32(-8)), np.float32(7)))
        scale = eps if scale == 0 else scale
        scales[g] = scale
        zeros[g] = np.int8(zero)
        for at in range(start, start + group, STEP):
            _pack_zero(x, at, scale, np.float32(zero), packed)


@kernel
def encode_rows(x, columns, eps, out, scales):  # type: ignore[no-untyped-def]
    """Symmetric codes of eight bits, a scale a row. x: (rows * columns,); out: int8 bits as uint8; scales as above."""
    for r in range(scales.size):
        start, stop = r * columns, (r + 1) * columns
        whole = start + columns // STEP * STEP
        top = np.uint32(0)
        for at in range(start, whole, STEP):
            top = max(top, top_bits_32(x, at))
        for at in range(whole, stop):
            top = max(top, top_bits_1(x, at))
        scale = quotient_like(x, float_of_bits(x, top), np.float32(127.5))
        scale = eps if scale == 0 else scale
        scales[r] = scale
        for at in range(start, whole, STEP):
            _plain_8(x, at, scale, out)
        for at in range(whole, stop):
            _plain_8_one(x, at, scale, out)


def pack_zeros(zeros: np.ndarray) -> np.ndarray:
    """int8 (R, G) zeros to uint32 (ceil(R / 8), G): eight rows to a word, the first lowest; missing rows are 0 bits."""
    rows, groups = zeros.shape
    codes = np.zeros((-(-rows // 8) * 8, groups), np.uint32)
    codes[:rows] = zeros.astype(np.int32) + 8
    eights = codes.reshape(-1, 8, groups)
    words = np.zeros((eights.shape[0], groups), np.uint32)
    for row in range(8):
        words |= eights[:, row] << np.uint32(4 * row)
    return words


# --- decoding


def _times(lanes: Lanes, codes: Value, shift: Value, scale: Value, out: Array, at: Value) -> None:
    """(codes - shift) * scale, where `shift` is a float32 scalar."""
    values = lanes.b.sitofp(codes, narrow.floats(codes))
    count = codes.type.count
    lanes.store(lanes.b.fmul(lanes.b.fsub(values, lanes.splat(shift, count)), lanes.splat(scale, count)), out, at)


@vector(types.void)
def _unpack_4(lanes: Lanes, packed: Array, at: Value, shift: Value, scale: Value, out: Array) -> None:
    _times(lanes, narrow.load_nibbles(lanes, packed, lanes.op("lshr", at, 1), STEP), shift, scale, out, at)


@vector(types.void)
def _unpack_8(lanes: Lanes, packed: Array, at: Value, shift: Value, scale: Value, out: Array) -> None:
    _times(lanes, narrow.load_bytes(lanes, packed, at, STEP), shift, scale, out, at)


@kernel
def decode(packed, group, bits, scales, shifts, out):  # type: ignore[no-untyped-def]
    """(stored code - shift) * scale; groups of a multiple of STEP. packed: uint8; scales, shifts: float32 by group."""
    for g in range(scales.size):
        for at in range(g * group, (g + 1) * group, STEP):
            if bits == 4:
                _unpack_4(packed, at, shifts[g], scales[g], out)
            else:
                _unpack_8(packed, at, shifts[g], scales[g], out)


@kernel
def decode_any(packed, bits, columns, group, scales, shifts, out):  # type: ignore[no-untyped-def]
    """`decode` for any group and row length: each row of `columns` begins a word. scales, shifts: (rows, groups)."""
    row_bytes = (columns * bits + 31) // 32 * 4
    mask = (1 << bits) - 1
    for r in range(scales.shape[0]):
        for c in range(columns):
            at = c * bits
            code = (packed[r * row_bytes + at // 8] >> (at % 8)) & mask
            g = c // group
            out[r * columns + c] = (np.float32(code) - shifts[r, g]) * scales[r, g]


@kernel
def decode_rows(codes, columns, scales, out):  # type: ignore[no-untyped-def]
    """Plain int8 codes times their row's scale. codes: int8 (rows * columns,)."""
    for r in range(scales.size):
        for at in range(r * columns, (r + 1) * columns):
            out[at] = np.float32(codes[at]) * scales[r]


def unpack_zeros(words: np.ndarray, rows: int) -> np.ndarray:
    """uint32 (ceil(rows / 8), G) words to float32 (rows, G) shifts: the stored zeros, with their 8."""
    shifts = np.arange(8, dtype=np.uint32) * np.uint32(4)
    codes = (words[:, None, :] >> shifts[None, :, None]) & np.uint32(15)
    return np.ascontiguousarray(codes.reshape(-1, words.shape[1])[:rows]).astype(np.float32)
