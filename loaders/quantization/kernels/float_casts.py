"""Casts between float dtypes by vectors, as `casts.cast` says. Raw weights: bfloat16 as uint16, float16 as int16.

A NaN becomes the quiet 0x7FC0 in bfloat16, as in torch. Between float16 and float32 its sign and the upper bits of its
mantissa are kept, as numpy does; where those are 0, which would be an infinity, the lowest bit is set.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import F16, I16, I32, Array, Lanes, Value, host_has, kernel, vector

WIDE = 32  # weights cast at once


def _is_nan(lanes: Lanes, values: Value) -> Value:
    return lanes.b.fcmp_unordered("uno", values, values)


def _to_bf16(lanes: Lanes, values: Value) -> Value:
    """Round float32 lanes to bfloat16 bits, nearest even.

    Adding 0x7FFF, and 1 more where the last kept bit is odd, carries into the kept half exactly where nearest-even
    rounds up. The sum could turn a NaN into an infinity or carry into its sign.
    """
    bits = lanes.b.bitcast(values, ir.VectorType(I32, values.type.count))
    odd = lanes.op("and_", lanes.op("lshr", bits, 16), 1)
    rounded = lanes.op("lshr", lanes.b.add(lanes.op("add", bits, 0x7FFF), odd), 16)
    found = lanes.b.select(_is_nan(lanes, values), lanes.const(bits.type, 0x7FC0), rounded)
    return lanes.b.trunc(found, ir.VectorType(I16, values.type.count))


def _to_f16(lanes: Lanes, values: Value) -> Value:
    """Round float32 lanes to float16 bits, nearest even, by x86's instruction (F16C) where it exists."""
    count = values.type.count
    narrow = ir.VectorType(I16, count)
    if host_has("f16c"):
        found = lanes.b.bitcast(lanes.b.fptrunc(values, ir.VectorType(F16, count)), narrow)
    else:
        found = lanes.to_f16(values)
    bits = lanes.b.bitcast(values, ir.VectorType(I32, count))
    mantissa = lanes.op("and_", lanes.op("lshr", bits, 13), 0x3FF)
    mantissa = lanes.b.select(
        lanes.b.icmp_unsigned("==", mantissa, lanes.const(bits.type, 0)), lanes.const(bits.type, 1), mantissa
    )
    sign = lanes.op("and_", lanes.op("lshr", bits, 16), 0x8000)
    nan = lanes.b.trunc(lanes.op("or_", lanes.b.or_(mantissa, sign), 0x7C00), narrow)
    return lanes.b.select(_is_nan(lanes, values), nan, found)


def _to_f32(lanes: Lanes, values: Value) -> Value:
    return values


def _floats(lanes: Lanes, x: Array, at: Value, count: int) -> Value:
    """Load weights as float32, NaN as they are: F16C's instruction would make them quiet."""
    values = lanes.floats(x, at, count)
    if x.holds != types.int16:
        return values
    wide = ir.VectorType(I32, count)
    bits = lanes.b.zext(lanes.load(x, at, count), wide)
    sign, mantissa = (
        lanes.op("shl", lanes.op("and_", bits, 0x8000), 16),
        lanes.op("shl", lanes.op("and_", bits, 0x3FF), 13),
    )
    nan = lanes.b.bitcast(lanes.op("or_", lanes.b.or_(sign, mantissa), 0x7F800000), values.type)
    return lanes.b.select(_is_nan(lanes, values), nan, values)


def _caster(rounded: Callable[[Lanes, Value], Value]) -> Callable[..., None]:
    """Return what casts weights [start, stop) of x to those of `out`, `width` at once."""

    def cast(lanes: Lanes, x: Array, out: Array, start: Value, stop: Value, width: int) -> None:
        def step(at: Value) -> list[Value]:
            lanes.store(rounded(lanes, _floats(lanes, x, at, width)), out, at)
            return []

        lanes.fold(start, stop, width, [], step)

    @vector(types.void)
    def cast_all(lanes: Lanes, x: Array, out: Array, count: Value) -> None:
        whole = lanes.op("and_", count, -WIDE)
        cast(lanes, x, out, ir.Constant(count.type, 0), whole, WIDE)
        cast(lanes, x, out, whole, count, 1)

    return cast_all  # type: ignore[no-any-return]


_all_to_bf16, _all_to_f16, _all_to_f32 = _caster(_to_bf16), _caster(_to_f16), _caster(_to_f32)


@kernel
def to_bf16(x, out):  # type: ignore[no-untyped-def]
    """Round raw weights to bfloat16. x: (n,); out: uint16 (n,)."""
    _all_to_bf16(x, out, x.size)


@kernel
def to_f16(x, out):  # type: ignore[no-untyped-def]
    """Round raw weights to float16. x: (n,); out: int16 (n,)."""
    _all_to_f16(x, out, x.size)


@kernel
def to_f32(x, out):  # type: ignore[no-untyped-def]
    """Widen raw weights to float32. x: (n,); out: float32 (n,)."""
    _all_to_f32(x, out, x.size)


CASTS = {"BF16": to_bf16, "F16": to_f16, "F32": to_f32}
