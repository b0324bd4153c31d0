"""The fields of ggml's blocks loaded into lanes, and weights put one after another.

data: uint8, whole blocks; `at`: the byte at which a block begins; `offset`: that of a field within it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from loaders.quantization.kernels.intrinsics import half_value
from loaders.quantization.kernels.lanes import I16, I32, Array, Lanes, Value, kernel


@kernel
def half_at(data, at):  # type: ignore[no-untyped-def]
    """Return the float16 at byte `at`, little-endian, as float32."""
    return half_value(np.uint16(np.uint16(data[at]) | np.uint16(np.uint16(data[at + 1]) << np.uint16(8))))


def load_bytes(lanes: Lanes, data: Array, at: Value, offset: int, count: int) -> Value:
    """Load `count` bytes from byte `at` + `offset` on."""
    return lanes.load(data, lanes.op("add", at, offset), count)


def integers(lanes: Lanes, raw: Value) -> Value:
    """Widen unsigned bytes to int32 lanes."""
    return lanes.b.zext(raw, ir.VectorType(I32, raw.type.count))


def half(lanes: Lanes, data: Array, at: Value, offset: int) -> Value:
    """Return sixteen lanes of the float16 at byte `at` + `offset`, as float32.

    A float16 converted alone would wait for the one before: it is put into a register that holds that one's result.
    """
    bits = lanes.b.bitcast(load_bytes(lanes, data, at, offset, 2), I16)
    return lanes.from_f16(lanes.splat(bits, 16))


def put(lanes: Lanes, values: list[Value], out: Array, to: Value) -> None:
    """Store vectors of sixteen weights one after another, from weight `to` on."""
    for index, each in enumerate(values):
        lanes.store(each, out, lanes.op("add", to, 16 * index))


def scaled(lanes: Lanes, codes: Value, scale: Value) -> Value:
    """Return code * scale for sixteen int32 codes."""
    return lanes.b.fmul(lanes.b.sitofp(codes, scale.type), scale)
