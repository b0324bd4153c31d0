"""Small functions that kernels of any scheme call: 16-bit floats one by one, aligned memory, transposes, prefetches."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from loaders.quantization.kernels.lanes import CACHE_LINE, F32, I32, Array, Lanes, Value, kernel, vector


@kernel
def aligned_floats(count):  # type: ignore[no-untyped-def]
    """Return an uninitialized float32 array (count,) that begins at a cache line.

    numba's own begin at any 32 bytes, so that every vector of AVX-512 may lie in two lines, which takes two accesses.
    """
    whole = np.empty(count + CACHE_LINE // 4, np.float32)
    first = np.int64(CACHE_LINE - whole.ctypes.data % CACHE_LINE) // 4
    return whole[first : first + count]


@vector(types.float32)
def bf16_value(lanes: Lanes, bits: Value) -> Value:
    """Return the float32 value of a bfloat16's bits."""
    return lanes.b.bitcast(lanes.op("shl", lanes.b.zext(bits, I32), 16), F32)


@vector(types.uint16)
def half_bits(lanes: Lanes, value: Value) -> Value:
    """Round a float32 to float16 and give its bits."""
    return lanes.b.extract_element(lanes.to_f16(lanes.splat(value, 1)), ir.Constant(I32, 0))


@vector(types.float32)
def half_value(lanes: Lanes, bits: Value) -> Value:
    """Return the float32 value of a float16's bits."""
    return lanes.b.extract_element(lanes.from_f16(lanes.splat(bits, 1)), ir.Constant(I32, 0))


@vector(types.void)
def transpose(lanes: Lanes, x: Array, at: Value, stride: Value, block: Array, to: Value, row: Value) -> None:
    """Write sixteen weights of each of sixteen groups into sixteen rows of a block of float32s, a group in each column.

    Groups begin `stride` weights apart, from weight `at` on; rows begin `row` entries apart, from entry `to` on.
    """
    places = [lanes.b.add(at, lanes.b.mul(stride, ir.Constant(stride.type, lane))) for lane in range(16)]
    for k, values in enumerate(lanes.transposed([lanes.floats(x, place, 16) for place in places])):
        lanes.store(values, block, lanes.b.add(to, lanes.b.mul(row, ir.Constant(row.type, k))))


@vector(types.void)
def prefetch(lanes: Lanes, x: Array, start: Value, stop: Value) -> None:
    """Ask the memory for weights [start, stop), which are needed soon. They may lie beyond the array's end.

    Encoders go over each group twice: to find its scale, and to code it while it lies in the cache. Without this the
    memory would idle during every second pass; asking for a later group then makes a large tensor up to a third faster.
    """
    flags = [ir.Constant(I32, flag) for flag in (0, 3, 1)]  # llvm.prefetch: to read, to keep in all caches, data

    def ask(at: Value) -> list[Value]:
        lanes.call("llvm.prefetch.p0", ir.VoidType(), lanes.b.gep(x.data, [at]), *flags)
        return []

    lanes.fold(start, stop, CACHE_LINE // lanes.context.get_abi_sizeof(x.element), [], ask)
