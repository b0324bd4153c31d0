"""Vector code for the inner block of a kernel, on any machine: a thin layer over LLVM's vector types.

numba compiles the loop over blocks. The body of a block is written with `Lanes`, as values of several lanes, so that
its speed does not depend on what the autovectorizer makes of a loop. Vectors here are as wide as the algorithm wants:
LLVM cuts them to the registers that the machine has (AVX2, AVX-512, NEON). Some operations have a second form with the
same result: `lookup`, a table of sixteen floats, is a register permutation on x86 with AVX2 and a tree of selections
elsewhere; float16 is converted by x86's instructions (F16C) where they exist, and by integers elsewhere.

Arrays carry raw bits, and their numpy dtype says what the bits are: uint16 is bfloat16, int16 is float16 (numba has no
float16 arrays on a CPU), float32 is itself.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from loaders.quantization.kernels.kept import keep

CACHE_LINE = 64  # bytes, on x86 and most ARM CPUs; where lines are longer, `prefetch` asks for some twice
I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
F32 = ir.FloatType()
F16 = ir.HalfType()
NAMES = {ir.IntType(1): "i1", I8: "i8", I16: "i16", I32: "i32", F32: "f32"}  # the types' names in LLVM's intrinsics
Value = Any  # an llvmlite value or type; llvmlite has no annotations


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function by numba, once for the types of its arguments on a machine.

    It releases the interpreter's lock, so that threads run side by side. A division by zero gives an infinity, as in C,
    where Python would raise.
    """
    made: Any = njit(nogil=True, error_model="numpy")(function)
    keep(made, [kernels_digest()])
    return made


def inlined(function: Callable[..., Any]) -> Any:
    """Let kernels call a function as if its body stood in theirs, so that it may take other kernels as arguments.

    numba keeps a kernel that takes some, or that a function has made, in no cache on the disk.
    """
    return njit(inline="always")(function)


@cache
def kernels_digest() -> str:
    """Return the SHA-256 of all files of this folder, in the order of their names."""
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    return hashlib.sha256(
        b"".join(f"{file.relative_to(folder)}\n".encode() + file.read_bytes() for file in files)
    ).hexdigest()


def host_has(feature: str) -> bool:
    """Whether the code that is being compiled may use a CPU feature.

    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are respected as numba does; a CPU named there is taken to have no features.
    """
    name, features = getattr(config, "CPU_NAME", None), getattr(config, "CPU_FEATURES", None)
    if features is not None:
        return f"+{feature}" in features.split(",")
    if name not in (None, "host"):
        return False
    return bool(llvm.get_host_cpu_features().get(feature))


class Lanes:
    """A builder of vector values; `b` is llvmlite's own builder, for the plain integer and float operations."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context = context
        self.b = builder

    # values

    def const(self, kind: Value, value: Any) -> Value:
        """Return a constant: one number for every lane, or a sequence with a number for each."""
        if isinstance(kind, ir.VectorType):
            items = list(value) if np.ndim(value) else [value] * kind.count
            return ir.Constant(kind, [self.const(kind.element, item) for item in items])
        return ir.Constant(kind, float(value) if kind is F32 else int(value))

    def splat(self, scalar: Value, count: int) -> Value:
        """Return a vector of `count` lanes that all hold a scalar."""
        empty = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
        return self.shuffle(self.b.insert_element(empty, scalar, ir.Constant(I32, 0)), [0] * count)

    def shuffle(self, first: Value, positions: Sequence[int], second: Value | None = None) -> Value:
        """Pick lanes by position from one vector, or from two as if they lay end to end."""
        second = ir.Constant(first.type, ir.Undefined) if second is None else second
        return self.b.shuffle_vector(first, second, self.const(ir.VectorType(I32, len(positions)), positions))

    def part(self, value: Value, index: int, count: int) -> Value:
        """Return lanes [index * count, (index + 1) * count) of a vector."""
        return self.shuffle(value, range(index * count, (index + 1) * count))

    def join(self, parts: Sequence[Value]) -> Value:
        """Put vectors of one type end to end; their number is a power of two."""
        while len(parts) > 1:
            width = range(2 * parts[0].type.count)
            parts = [self.shuffle(a, width, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def transposed(self, rows: Sequence[Value]) -> list[Value]:
        """Transpose a square: lane j of vector i becomes lane i of vector j. The number of vectors is a power of two.

        Each level swaps the off-diagonal halves of square blocks, and then goes into the blocks of half the size.
        """
        found, count = list(rows), len(rows)
        step = count // 2
        while step:
            for i in (i for i in range(count) if not i & step):
                a, b = found[i], found[i + step]
                found[i] = self.shuffle(a, [count + j - step if j & step else j for j in range(count)], b)
                found[i + step] = self.shuffle(a, [count + j if j & step else j + step for j in range(count)], b)
            step //= 2
        return found

    def op(self, name: str, value: Value, number: float) -> Value:
        """Apply the builder's operation `name` to a value and a constant of its type."""
        return getattr(self.b, name)(value, self.const(value.type, number))

    def call(self, name: str, result: Value, *arguments: Value) -> Value:
        """Call an LLVM intrinsic that gives a value of type `result`."""
        signature = ir.FunctionType(result, [a.type for a in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, signature, name), arguments)  # type: ignore[no-untyped-call]

    def reduce(self, name: str, value: Value) -> Value:
        """Combine all lanes into a scalar by an LLVM reduction such as "umax" or "or"."""
        kind = value.type
        return self.call(f"llvm.vector.reduce.{name}.v{kind.count}{NAMES[kind.element]}", kind.element, value)

    def each_reduced(self, name: str, rows: Sequence[Value]) -> Value:
        """Reduce each of 2^k vectors of at least as many int16 lanes by "umax" or "smax"; results are in their order.

        With AVX-512BW, two vectors become one by a permutation of both to their lower and their upper halves, at every
        level of ever shorter pieces: three instructions a vector.
        """
        if not host_has("avx512bw"):
            kind = ir.VectorType(I16, len(rows))
            found = ir.Constant(kind, ir.Undefined)
            for lane, row in enumerate(rows):
                found = self.b.insert_element(found, self.reduce(name, row), ir.Constant(I32, lane))
            return found

        is_greater = self.b.icmp_unsigned if name == "umax" else self.b.icmp_signed

        def halved(first: Value, second: Value | None, length: int) -> Value:
            """Put the greater halves of all pieces of `length` lanes, of one vector or of two, end to end."""
            starts = range(0, first.type.count * (1 if second is None else 2), length)
            low, high = (
                self.shuffle(first, [start + half + i for start in starts for i in range(length // 2)], second)
                for half in (0, length // 2)
            )
            return self.b.select(is_greater(">", low, high), low, high)

        found, length = list(rows), rows[0].type.count
        while len(found) > 1:
            found = [halved(a, b, length) for a, b in zip(found[::2], found[1::2], strict=True)]
            length //= 2
        [one] = found
        while length > 1:
            one, length = halved(one, None, length), length // 2
        return one

    def absolute(self, value: Value) -> Value:
        return self.call(f"llvm.fabs.v{value.type.count}f32", value.type, value)

    def larger(self, a: Value, b: Value) -> Value:
        """Return C's `a > b ? a : b`, lane by lane: `b` where either is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def nibbles(self, codes: Value, *, first_high: bool) -> Value:
        """Pack int16 codes below 16 into int8 lanes of two neighbours each; AVX-512BW weighs and adds both at once."""
        count = codes.type.count
        if host_has("avx512bw") and count % 32 == 0:
            weights = self.const(ir.VectorType(I16, 32), [16, 1] * 16 if first_high else [1, 16] * 16)
            kind, parts = ir.VectorType(I32, 16), (self.part(codes, i, 32) for i in range(count // 32))
            both = self.join([self.call("llvm.x86.avx512.pmaddw.d.512", kind, part, weights) for part in parts])
        else:
            pairs = self.b.bitcast(codes, ir.VectorType(I32, count // 2))
            if first_high:
                both = self.b.or_(self.op("shl", pairs, 4), self.op("lshr", pairs, 16))
            else:
                both = self.b.or_(pairs, self.op("lshr", pairs, 12))
        return self.b.trunc(both, ir.VectorType(I8, count // 2))

    # loops

    def fold(
        self, start: Value, stop: Value, step: int, values: Sequence[Value], body: Callable[..., Sequence[Value]]
    ) -> list[Value]:
        """Repeat values = body(at, *values) for each `at` in range(start, stop, step), and return the last values.

        The values are local variables of the function, which LLVM's mem2reg pass keeps in registers.
        """
        kept = [cgutils.alloca_once_value(self.b, value) for value in values]  # type: ignore[no-untyped-call]
        with cgutils.for_range_slice(self.b, start, stop, ir.Constant(start.type, step), inc=True) as (at, _):
            for slot, value in zip(kept, body(at, *map(self.b.load, kept)), strict=True):
                self.b.store(value, slot)
        return [self.b.load(slot) for slot in kept]

    # memory: align=1, since blocks begin at any element and packed codes at any byte

    def load(self, array: Array, at: Value, count: int) -> Value:
        """Load `count` elements from element `at` on, as they are stored."""
        return self.b.load(array.pointer(at, ir.VectorType(array.element, count)), align=1)

    def entries(self, array: Array, entries: int, count: int) -> list[Value]:
        """Return each of the first `entries` elements of an array as a vector of `count` equal lanes."""
        found = []
        for index in range(entries):
            at = self.b.gep(array.data, [ir.Constant(ir.IntType(64), index)])
            found.append(self.splat(self.b.load(at), count))
        return found

    def store(self, value: Value, array: Array, at: Value) -> None:
        """Store a scalar or a vector from element `at` of an array on."""
        self.b.store(value, array.pointer(at, value.type), align=1)

    def floats(self, array: Array, at: Value, count: int) -> Value:
        """Load `count` weights as float32, which holds every bfloat16 and float16 exactly."""
        raw = self.load(array, at, count)
        if array.holds == types.uint16:
            return self.from_bf16(raw)
        return self.from_f16(raw) if array.holds == types.int16 else raw

    def pairs(self, array: Array, at: Value, count: int) -> tuple[Value, Value]:
        """Load `count` weights as float32 in two vectors, those at even places and those at odd ones.

        bfloat16s are cheap to split so: in a 32-bit word of two, a shift gives the lower one and a mask the upper.
        """
        if array.holds != types.uint16:
            values = self.floats(array, at, count)
            return self.shuffle(values, range(0, count, 2)), self.shuffle(values, range(1, count, 2))
        words = self.b.bitcast(self.load(array, at, count), ir.VectorType(I32, count // 2))
        kind = ir.VectorType(F32, count // 2)
        return self.b.bitcast(self.op("shl", words, 16), kind), self.b.bitcast(self.op("and_", words, -65536), kind)

    def interleaved(self, even: Value, odd: Value) -> Value:
        """Interleave two vectors, the lanes at even places and those at odd ones."""
        count = even.type.count
        return self.shuffle(even, [lane // 2 + count * (lane % 2) for lane in range(2 * count)], odd)

    def woven(self, even: Value, odd: Value) -> Value:
        """Interleave the low halves of two int32 vectors, of even and of odd places, into one int16 vector."""
        both = self.b.or_(self.op("and_", even, 0xFFFF), self.op("shl", odd, 16))
        return self.b.bitcast(both, ir.VectorType(I16, 2 * even.type.count))

    def from_bf16(self, bits: Value) -> Value:
        """Return the float32 lanes of bfloat16 bits (int16 lanes), which are their upper halves."""
        wide = self.op("shl", self.b.zext(bits, ir.VectorType(I32, bits.type.count)), 16)
        return self.b.bitcast(wide, ir.VectorType(F32, bits.type.count))

    def from_f16(self, bits: Value) -> Value:
        """Return the float32 lanes of float16 bits (int16 lanes), by F16C's instruction or by integers.

        By integers, exponent and mantissa move to float32's places. The result is too small by 2^112, the difference of
        the exponents' biases (127 and 15); one exact product mends that for normal and subnormal numbers alike.
        """
        if host_has("f16c"):
            halves = self.b.bitcast(bits, ir.VectorType(F16, bits.type.count))
            return self.b.fpext(halves, ir.VectorType(F32, bits.type.count))
        kind = ir.VectorType(I32, bits.type.count)
        wide = self.b.zext(bits, kind)
        small = self.op("shl", self.op("and_", wide, 0x7FFF), 13)
        scaled = self.b.fmul(
            self.b.bitcast(small, ir.VectorType(F32, kind.count)), self.const(ir.VectorType(F32, kind.count), 2.0**112)
        )
        special = self.b.icmp_unsigned(">=", small, self.const(kind, 0x7C00 << 13))
        magnitude = self.b.select(special, self.op("or_", small, 0x7F800000), self.b.bitcast(scaled, kind))
        sign = self.op("shl", self.op("and_", wide, 0x8000), 16)
        return self.b.bitcast(self.b.or_(magnitude, sign), ir.VectorType(F32, kind.count))

    def to_f16(self, values: Value) -> Value:
        """Round float32 lanes to float16 bits (int16 lanes), nearest even.

        Normal numbers are rounded by integers. Below 2^-14 float16's steps are 2^-24, as float32's are from 0.5 to 1:
        adding 0.5 rounds to them and leaves the code in the lowest bits.
        """
        count = values.type.count
        wide, narrow = ir.VectorType(I32, count), ir.VectorType(I16, count)
        bits = self.b.bitcast(values, wide)
        magnitude = self.op("and_", bits, 0x7FFFFFFF)
        even = self.op("and_", self.op("lshr", magnitude, 13), 1)
        normal = self.op("lshr", self.b.add(self.op("sub", magnitude, (112 << 23) - 0xFFF), even), 13)
        half = self.const(values.type, 0.5)
        shifted = self.b.fadd(self.b.bitcast(magnitude, values.type), half)
        small = self.op("sub", self.b.bitcast(shifted, wide), 0x3F000000)
        found = self.b.select(self.b.icmp_unsigned("<", magnitude, self.const(wide, 113 << 23)), small, normal)
        infinite = self.b.icmp_unsigned(">=", magnitude, self.const(wide, 143 << 23))
        found = self.b.select(infinite, self.const(wide, 0x7C00), found)
        is_nan = self.b.icmp_unsigned(">", magnitude, self.const(wide, 0x7F800000))
        found = self.b.select(is_nan, self.const(wide, 0x7E00), found)
        sign = self.op("and_", self.op("lshr", bits, 16), 0x8000)
        return self.b.trunc(self.b.or_(found, sign), narrow)

    def rounded_to_f16(self, values: Value) -> Value:
        """Round float32 lanes to float16's numbers, nearest even, and keep them as float32.

        Magnitudes from 65520 on, halfway from the greatest number to the next power of two, become infinite.
        """
        if host_has("f16c"):
            return self.b.fpext(self.b.fptrunc(values, ir.VectorType(F16, values.type.count)), values.type)
        wide = ir.VectorType(I32, values.type.count)
        bits = self.b.bitcast(values, wide)
        magnitude = self.op("and_", bits, 0x7FFFFFFF)
        size = self.b.bitcast(magnitude, values.type)
        small = self.op("fsub", self.op("fadd", size, 0.5), 0.5)  # see `to_f16`
        odd = self.op("and_", self.op("lshr", magnitude, 13), 1)
        rounded = self.op("and_", self.b.add(self.op("add", magnitude, 0xFFF), odd), -8192)
        is_small = self.b.fcmp_ordered("<", size, self.const(values.type, 2.0**-14))
        is_large = self.b.fcmp_ordered(">=", size, self.const(values.type, 65520.0))
        found = self.b.select(is_small, self.b.bitcast(small, wide), rounded)
        found = self.b.select(is_large, self.const(wide, 0x7F800000), found)
        found = self.b.select(self.b.fcmp_unordered("uno", size, size), magnitude, found)
        return self.b.bitcast(self.b.or_(found, self.op("and_", bits, -(1 << 31))), values.type)

    # tables

    def lookup(self, table: Sequence[float], codes: Value) -> Value:
        """Return table[code] for a table of sixteen float32 entries and int32 codes from 0 to 15."""
        return self.looked_up(self.const(ir.VectorType(F32, 16), table), codes)

    def looked_up(self, table: Value, codes: Value) -> Value:
        """Return table[code] for a vector of sixteen float32 entries and int32 codes from 0 to 15."""
        count = codes.type.count
        if host_has("avx512f") and count % 16 == 0:
            name, parts = "llvm.x86.avx512.permvar.sf.512", (self.part(codes, i, 16) for i in range(count // 16))
            return self.join([self.call(name, table.type, table, part) for part in parts])
        if host_has("avx2"):
            return self.join([self._permuted(table, self.part(codes, i, 8)) for i in range(count // 8)])
        return self.choose([self.shuffle(table, [entry] * count) for entry in range(16)], codes)

    def _permuted(self, table: Value, codes: Value) -> Value:
        """Look up eight codes. AVX2's permutation reads the three lowest bits of a code; the fourth picks the half."""
        kind = ir.VectorType(F32, 8)
        low, high = (self.call("llvm.x86.avx2.permps", kind, self.part(table, half, 8), codes) for half in range(2))
        return self.b.select(self.b.icmp_signed(">", codes, self.const(codes.type, 7)), high, low)

    def lookup_16(self, table: Value, codes: Value) -> Value:
        """Return table[code] for int16 lanes and codes: of 16 entries, or of 32 with AVX-512BW."""
        count = codes.type.count
        if host_has("avx512bw") and count % 32 == 0:
            twice = self.shuffle(table, [*range(16)] * 2) if table.type.count == 16 else table
            name, parts = "llvm.x86.avx512.permvar.hi.512", (self.part(codes, i, 32) for i in range(count // 32))
            return self.join([self.call(name, twice.type, twice, part) for part in parts])
        return self.choose([self.shuffle(table, [entry] * count) for entry in range(16)], codes)

    def choose(self, entries: Sequence[Value], codes: Value) -> Value:
        """Return entries[code], lane by lane, for sixteen vectors, by a tree of selections: a level for each bit."""
        for bit in range(4):
            is_set = self.b.icmp_unsigned("!=", self.op("and_", codes, 1 << bit), self.const(codes.type, 0))
            entries = [self.b.select(is_set, b, a) for a, b in zip(entries[::2], entries[1::2], strict=True)]
        return entries[0]


class Array:
    """An array argument of a kernel: its numba dtype (`holds`), the LLVM type of an element, and its data's address."""

    def __init__(self, lanes: Lanes, kind: types.Array, value: Value) -> None:
        self.lanes = lanes
        self.holds = kind.dtype
        self.element = lanes.context.get_data_type(kind.dtype)
        self.data = lanes.context.make_array(kind)(lanes.context, lanes.b, value).data

    def pointer(self, at: Value, kind: Value) -> Value:
        """Return the address of element `at` as a pointer to a value of type `kind`."""
        return self.lanes.b.bitcast(self.lanes.b.gep(self.data, [at]), kind.as_pointer())


def vector(result: Any) -> Callable[[Callable[..., Value]], Any]:
    """Make a function over `Lanes` callable from kernels, as a numba intrinsic that gives a value of type `result`.

    The function's array arguments arrive as `Array`, its numbers as LLVM scalars.
    """

    def wrap(body: Callable[..., Value]) -> Any:
        def typing(typingctx: Any, *arguments: Any) -> Any:
            def lower(context: Any, builder: Any, signature: Any, values: Any) -> Value:
                lanes = Lanes(context, builder)
                given = [
                    Array(lanes, kind, value) if isinstance(kind, types.Array) else value
                    for kind, value in zip(arguments, values, strict=True)
                ]
                made = body(lanes, *given)
                return context.get_dummy_value() if made is None else made

            return result(*arguments), lower

        # numba reads an intrinsic's parameters from its signature, so `typing` pretends to have those of the body.
        context = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        own = list(inspect.signature(body).parameters.values())[1:]
        typing.__signature__ = inspect.Signature([context, *own])  # type: ignore[attr-defined]
        typing.__name__ = body.__name__
        return intrinsic(typing)

    return wrap
