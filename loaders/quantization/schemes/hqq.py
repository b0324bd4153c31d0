"""HQQ, as the hqq package stores and loads it: 8, 4, 3, 2 or 1 bits a weight, groups with a scale and a zero.

The weight's flat values are a matrix of (groups, group_size) with axis=1, or of (group_size, groups) with axis=0;
groups run across the ends of the weight's rows. The matrix's rows are packed in `parts` runs of `rows` rows each: a
byte (with 3 bits an int32) holds the same place of every run, the first run in the highest bits (hqq/core/bitpack.py).
By role:
    W_q    uint8 (rows, group_size) or (rows, groups); 3 bits: int32, ten runs, the last padded with zeros
    scale  (groups, 1) or (1, groups), in the compute dtype: weight = (code - zero) * scale, each step rounded to it
    zero   likewise
and hqq's metadata, a tensor for each item (hqq/core/utils.py, encode_safetensor_type).

There are two passes, since hqq stops when the mean error of the whole tensor stops falling: the first makes all
updates and adds up their errors; the second codes by the zeros at which hqq would stop. Most zeros have long settled by
then, and are kept from the first pass; the others are found again by as many updates as hqq would make. Sums are taken
over TILE groups each and added exactly, so that they do not depend on how a tensor is cut; the mean is a float32, as
hqq's. Given the same number of updates, bytes are hqq's wherever torch sums a group in the kernel's order. hqq sums the
tensor's errors in another order, so that it may stop an update earlier or later where they hardly fall any more; the
error is then the same to about 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np

from loaders.dtypes import DTYPES, WEIGHT_DTYPES, DType, storage_of
from loaders.errors import LEAVE, VerifyFailed, setting
from loaders.quantization import grid as grids
from loaders.quantization.grid import Grid
from loaders.quantization.scheme import Block, Sink, Stored, View, Work
from loaders.quantization.schemes.hqq_metadata import constant
from loaders.quantization.schemes.runs import PackedRuns, codes_by_chunks
from loaders.specs import StoredSpec, TensorSpec

BITS = (8, 4, 3, 2, 1)
PARTS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # codes in an item of W_q
PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}  # hqq's names for them
UPDATES = 20  # hqq's `iters`
TILE = 1024  # groups whose errors are one sum; fewer would hold more sums (see `state_bytes`)
KEPT = 1 << 23  # groups whose zeros are kept from the first pass: 72 MiB; those of larger tensors are found again
FINER = 4  # times as many ranges as for other schemes, whose weights take less time: every thread shall have some
HELD = 1 << 20  # scales that `decode` reads once for a whole range where groups are columns: 4 MiB, and zeros as much


class Kept:
    """What the first pass found for some groups: scales, zeros, and whether more updates moved a zero further."""

    def __init__(self, scales: np.ndarray, zeros: np.ndarray, moved: np.ndarray) -> None:
        """Hold arrays of solver.solve: float32, float32 and uint8 (groups,)."""
        self.arrays = scales, zeros, moved

    def part(self, first: int, last: int) -> Kept:
        """Return groups [first, last), in the same memory."""
        return Kept(*(each[first:last] for each in self.arrays))


@dataclass(frozen=True, slots=True)
class Hqq:
    """HQQ with its parameters. `compute_dtype` is that of scales and zeros ("BF16", ...); None is the weight's own."""

    kind: ClassVar[str] = "hqq"
    engine: ClassVar[str] = "hqq"
    backends: ClassVar[tuple[str, ...]] = ("cpu",)
    searched_on: ClassVar[tuple[str, ...]] = ("cuda",)
    bits: Literal[8, 4, 3, 2, 1] = 4
    group_size: int = 64
    axis: Literal[0, 1] = 1
    compute_dtype: str | None = None

    @property
    def error_limit(self) -> float:
        """The error of the worst groups: the two ends of a range around zero, and all others midway between two codes.

        The first codes are at most half a step off, and no update adds to the sum of squares: a new zero is the mean
        that makes it least for the present codes, and the next codes are the nearest. A step is 1 / `top` of the range,
        or half of the range where the scale is clipped to its greatest; a flat group becomes its mean. The last term is
        for the roundings of zeros and scales to the compute dtype.
        """
        steps = math.sqrt(self.group_size / 2) / min(self.top, 2 if self.bits > 1 else 1)
        return max(1.0, steps) + 0.02 * math.sqrt(self.group_size)

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2**self.bits - 1)

    @property
    def rounds_zero(self) -> bool:
        """Whether the first zero is rounded: hqq_base_quant_config in hqq/core/quantize.py asks for it at four bits."""
        return self.bits == 4

    def dtype_of(self, spec: TensorSpec) -> DType:
        """Return the dtype of scales and zeros, which is that of the engine's arithmetic."""
        dtype = spec.dtype if self.compute_dtype is None else DTYPES[self.compute_dtype]
        return DTYPES["F32"] if dtype.name == "F64" else dtype

    def layout(self, spec: TensorSpec) -> PackedRuns:
        groups = spec.numel // self.group_size
        matrix = (groups, self.group_size) if self.axis == 1 else (self.group_size, groups)
        return PackedRuns(groups, -(-matrix[0] // PARTS[self.bits]), matrix[1])

    def refuses(self, spec: TensorSpec) -> str | None:
        if spec.dtype.name not in WEIGHT_DTYPES:
            return f"its dtype is {spec.dtype}; hqq takes {', '.join(WEIGHT_DTYPES)}"
        if len(spec.shape) != 2 or spec.numel == 0:
            return f"its shape is {list(spec.shape)}; hqq takes matrices"
        if not spec.name.endswith("weight"):
            return "its name does not end in weight, and hqq keeps what it stores in the module that holds the weight"
        if spec.numel % self.group_size:
            return f"its {spec.numel} weights do not divide into groups of {self.group_size}"
        groups, parts = spec.numel // self.group_size, PARTS[self.bits]
        if self.axis == 1 and self.bits != 3 and groups % parts:
            return (
                f"its {groups} groups of {self.group_size} are no multiple of {parts}, and a byte holds the"
                f" {self.bits}-bit codes of {parts} groups; use another {setting('group_size')}, or {setting(LEAVE)}"
            )
        return None

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        layout, dtype = self.layout(spec), self.dtype_of(spec)
        of_groups = (layout.groups, 1) if self.axis == 1 else (1, layout.groups)
        roles = {
            "W_q": StoredSpec(DTYPES["I32" if self.bits == 3 else "U8"], (layout.packed_rows, layout.columns)),
            "scale": StoredSpec(dtype, of_groups),
            "zero": StoredSpec(dtype, of_groups),
        }
        return roles | {role: constant(value) for role, value in self.said(spec).items()}

    def said(self, spec: TensorSpec) -> dict[str, Any]:
        """Return the metadata that hqq's safetensors form stores for a module, a tensor each."""
        return {
            "nbits": self.bits,
            "group_size": self.group_size,
            "shape": spec.shape,
            "axis": self.axis,
            "packing": PACKING[self.bits],
            "unpack_view_dtype": "torch.int32" if self.bits == 3 else "torch.uint8",
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": f"torch.{self.dtype_of(spec).torch}",
            "offload_meta": False,
            "encoded_state_dict": True,
            "stores_quant_config": True,
            "channel_wise": True,
            "optimize": True,
            "round_zero": self.rounds_zero,
        }

    def state_bytes(self, spec: TensorSpec) -> int:
        groups = self.layout(spec).groups
        return -(-groups // TILE) * UPDATES * 8 + (9 * groups if groups <= KEPT else 0)

    # --- encoding

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        from loaders.quantization.kernels.hqq import solver

        groups = self.layout(view.spec).groups
        kept = None
        if groups <= KEPT:
            unknown = np.full(groups, solver.UNKNOWN, np.uint8)
            kept = Kept(np.empty(groups, np.float32), np.empty(groups, np.float32), unknown)
        updates = self._updates(view, work, kept)
        if self.axis == 1:
            self._encode_rows(view, sink, work, updates, kept)
        else:
            self._encode_columns(view, sink, work, updates, kept)

    def _updates(self, view: View, work: Work, kept: Kept | None = None) -> int:
        """Return the number of updates that hqq would make: it stops after the first whose mean error did not fall.

        An update's error is measured before it, so that hqq makes that update still. `kept` is filled in.
        """
        from loaders.quantization.kernels.hqq import solver

        layout = self.layout(view.spec)

        def errors(first: int, last: int) -> np.ndarray:
            x, stride = self._groups(view, first, last, work)
            sums = np.zeros((-(-(last - first) // TILE), UPDATES))
            found = kept.part(first, last) if kept is not None else self._scratch(work, last - first)
            self._solve(x, stride, view.spec, found, sums, work)
            return sums

        totals = np.empty(UPDATES)
        solver.add_tiles(np.concatenate(self._sweep(work, layout.groups, TILE, errors)), totals)
        with np.errstate(over="ignore"):  # an infinite mean is refused below
            means = (totals / view.spec.numel).astype(np.float32)
        if not np.isfinite(means).all():
            raise VerifyFailed(
                f"{view.spec.name}: it holds NaN or infinities (or weights near float32's end), and HQQ's search, which"
                " ends by the error of all weights, would end by them; keep the tensor by a rule"
            )
        return next((i + 1 for i in range(1, UPDATES) if not means[i] < means[i - 1]), UPDATES)

    def _scratch(self, work: Work, count: int) -> Kept:
        """Return memory of this thread for what is found for `count` groups; no zero in it is known yet."""
        from loaders.quantization.kernels.hqq import solver

        scales, zeros = (work.array(name, count, np.float32) for name in ("scales", "zeros"))
        moved = work.array("moved", count, np.uint8)
        moved[:] = solver.UNKNOWN
        return Kept(scales, zeros, moved)

    def _sweep(self, work: Work, groups: int, align: int, body: Callable[[int, int], Any]) -> list[Any]:
        """Call body(first, last) for ranges of groups.

        A range has fewer weights than other schemes', but where groups are columns: there it is read row by row.
        """
        size = self.group_size * (FINER if self.axis == 1 else 1)
        return work.sweep(groups * size, align * size, lambda start, stop: body(start // size, stop // size))

    def _groups(self, view: View, first: int, last: int, work: Work) -> tuple[np.ndarray, tuple[int, int]]:
        """Return the weights of groups [first, last), and the strides from group to group and from weight to weight.

        With axis=0 a group's weights lie far apart, a read for each; rows of `last - first` are then put together.
        """
        from loaders.quantization.kernels.cpu import kernel_input

        size, dtype = self.group_size, view.spec.dtype.name
        if self.axis == 1:
            return kernel_input(view.read(first * size, last * size), dtype), (size, 1)
        groups, count = self.layout(view.spec).groups, last - first
        if count == groups:
            return kernel_input(view.read(0, size * groups), dtype), (1, count)
        gathered = work.array("gathered", size * count, storage_of(view.spec.dtype))
        for k in range(size):
            gathered[k * count : (k + 1) * count] = view.read(k * groups + first, k * groups + last)
        return kernel_input(gathered, dtype), (1, count)

    def _solve(
        self, x: np.ndarray, stride: tuple[int, int], spec: TensorSpec, found: Kept, errors: np.ndarray, work: Work
    ) -> None:
        dtype = "F32" if spec.dtype.name == "F64" else spec.dtype.name  # as `_groups` returns them
        work.kernels.solve_hqq(
            x, dtype, stride, self.group_size, self.top, self.rounds_zero, TILE, found.arrays, errors
        )

    def _solved(
        self, x: np.ndarray, stride: tuple[int, int], found: Kept, updates: int, spec: TensorSpec, work: Work
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scales and zeros of groups after `updates`, unrounded for coding."""
        scales, zeros, moved = found.arrays
        if moved.max() > updates:
            self._solve(x, stride, spec, found, np.zeros((-(-scales.size // TILE), updates)), work)
        return scales, zeros

    def _to_store(self, spec: TensorSpec, count: int, work: Work) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return arrays for what is stored of `count` scales and zeros, and the same as kernels take them."""
        dtype = storage_of(self.dtype_of(spec))
        stored = [work.array(f"stored {role}", count, dtype) for role in ("scale", "zero")]
        return stored, [each.view(np.int16) if dtype == np.float16 else each for each in stored]

    def _shifts(self) -> list[int]:
        """Return the bit from which on each part's codes lie in an item of W_q."""
        return [self.bits * (PARTS[self.bits] - 1 - part) for part in range(PARTS[self.bits])]

    def _encode_rows(self, view: View, sink: Sink, work: Work, updates: int, kept: Kept | None) -> None:
        """Encode where groups are rows (axis=1): an item of W_q holds codes of distant groups."""
        from loaders.quantization.kernels.hqq import batch, encode

        spec, size, layout = view.spec, self.group_size, self.layout(view.spec)
        item = np.int32 if self.bits == 3 else np.uint8

        def pack(first: int, last: int) -> None:
            packed = work.array("packed", (last - first) * size, item)
            packed[:] = 0
            for part, shift in enumerate(self._shifts()):
                begin = part * layout.packed_rows + first
                end = min(part * layout.packed_rows + last, layout.groups)
                if end <= begin:
                    break
                x, stride = self._groups(view, begin, end, work)
                found = kept.part(begin, end) if kept is not None else self._scratch(work, end - begin)
                scales, zeros = self._solved(x, stride, found, updates, spec, work)
                stored, taken = self._to_store(spec, end - begin, work)
                encode.code_rows(x, size, scales, zeros, np.float32(self.top), shift, packed, *taken)
                sink.write("scale", begin, stored[0])
                sink.write("zero", begin, stored[1])
            sink.write("W_q", first * size, packed)

        self._sweep(work, layout.packed_rows, batch.LANES, pack)

    def _encode_columns(self, view: View, sink: Sink, work: Work, updates: int, kept: Kept | None) -> None:
        """Encode where groups are columns (axis=0): an item of W_q holds codes of one group."""
        from loaders.quantization.kernels.hqq import batch, encode

        spec, size, layout = view.spec, self.group_size, self.layout(view.spec)
        item = np.int32 if self.bits == 3 else np.uint8

        def pack(first: int, last: int) -> None:
            count = last - first
            x, stride = self._groups(view, first, last, work)
            found = kept.part(first, last) if kept is not None else self._scratch(work, count)
            scales, zeros = self._solved(x, stride, found, updates, spec, work)
            stored, taken = self._to_store(spec, count, work)
            packed = work.array("packed", layout.packed_rows * count, item)
            encode.code_columns(
                x, size, scales, zeros, np.float32(self.top), self._shifts()[0], self.bits, layout.packed_rows, packed,
                *taken,
            )  # fmt: skip
            sink.write("scale", first, stored[0])
            sink.write("zero", first, stored[1])
            if count == layout.groups:
                sink.write("W_q", 0, packed)
                return
            for row in range(layout.packed_rows):
                sink.write("W_q", row * layout.groups + first, packed[row * count : (row + 1) * count])

        self._sweep(work, layout.groups, batch.LANES, pack)

    # --- decoding

    def align(self, spec: TensorSpec) -> int:
        return self.group_size if self.axis == 1 else 1

    def grid(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> Grid:
        """Return the grid of the stored scales and zeros.

        Codes are the nearest by scale and zero before those are rounded to the compute dtype. The roundings, u each,
        add up to 4 u of (greatest code + |zero|) steps in what is decoded, and 2 u in the ends.
        """
        from loaders.quantization.kernels.cpu import kernel_input
        from loaders.quantization.kernels.hqq import decode

        groups, dtype = self.layout(spec).groups, self.dtype_of(spec).name
        if self.axis == 1:
            pieces = [(start // self.group_size, -(-stop // self.group_size))]
        elif stop - start <= groups:
            pieces = [(at % groups, (end - 1) % groups + 1) for at, end in self._pieces(groups, start, stop)]
        else:
            pieces = [(0, groups)]
        scales, zeros = (
            np.concatenate([kernel_input(stored.read(role, *piece), dtype).copy() for piece in pieces])
            for role in ("scale", "zero")
        )
        low, high, half = (np.empty(scales.size, np.float32) for _ in range(3))
        decode.ends(scales, zeros, np.float32(self.top), *_rounding(dtype), low, high, half)
        if self.axis == 0 and stop - start > groups:  # neighbours are of different groups
            low, high, half = (np.take(each, np.arange(start, stop) % groups) for each in (low, high, half))
        return Grid(self.group_size if self.axis == 1 else 1, low, high, half)

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        from loaders.quantization.kernels.cpu import kernel_input
        from loaders.quantization.kernels.hqq import compare

        size, run, dtype = self.group_size, self.layout(spec).run, self.dtype_of(spec).name
        if self.axis == 0 or not compare.is_made_for(size):
            return False
        groups = slice(start // size, stop // size)
        scales, zeros = (
            kernel_input(stored.read(role, groups.start, groups.stop), dtype) for role in ("scale", "zero")
        )
        x, room = kernel_input(block, source), grids.room_terms(grids.SMALL, source != spec.dtype.name)
        for at, end, codes, shift in codes_by_chunks(stored, "W_q", run, self._shifts(), start, stop):
            own = slice((at - start) // size, (end - start) // size)
            compare.compare_rows(
                x[at - start : end - start], codes, shift, self.top, scales[own], zeros[own], _rounding(dtype), room,
                sums,
            )  # fmt: skip
        return True

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        from loaders.quantization.kernels.cpu import kernel_input
        from loaders.quantization.kernels.hqq import decode

        layout, groups, dtype = self.layout(spec), self.layout(spec).groups, self.dtype_of(spec).name

        def read(first: int, last: int) -> list[np.ndarray]:
            return [kernel_input(stored.read(role, first, last), dtype) for role in ("scale", "zero")]

        if self.axis == 1:
            base = start // self.group_size
            held = read(base, -(-stop // self.group_size))
        else:
            base = 0
            held = read(0, groups) if groups <= min(HELD, stop - start) else []
        for part in range(start // layout.run, -(-stop // layout.run)):
            begin, shift = part * layout.run, self._shifts()[part]
            for at, end in self._pieces(groups, max(start, begin), min(stop, begin + layout.run)):
                codes, values = stored.read("W_q", at - begin, end - begin), out[at - start : end - start]
                if self.axis == 1:
                    first, last = at // self.group_size - base, end // self.group_size - base
                    scales, zeros = (each[first:last] for each in held)
                    decode.decode_rows(codes, shift, self.top, scales, zeros, values)
                else:
                    first = at % groups
                    last = first + end - at
                    scales, zeros = (each[first:last] for each in held) if held else read(first, last)
                    decode.decode_column(codes, shift, self.top, scales, zeros, values)

    def _pieces(self, groups: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut a range of one part where its scales begin again from the first: with axis=0, at every row of groups."""
        while start < stop:
            end = stop if self.axis == 1 else min(stop, (start // groups + 1) * groups)
            yield start, end
            start = end


@cache
def _rounding(dtype: str) -> tuple[np.float32, ...]:
    """Return what a grid allows for roundings to the compute dtype: a share of a value, a least step, and room."""
    share = 6 * grids.ROUNDING[dtype] + grids.SMALL
    return np.float32(share), np.float32(grids.LEAST[dtype]), np.float32(grids.TINY)
