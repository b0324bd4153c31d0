"""The error of a stored tensor: decode the stored bytes, compare them with the source's view, and add up.

This works for every scheme by its `decode` alone and shares no code with its encoder, so that a mistake in one does not
hide a mistake in the other. A plain copy is compared bit by bit.

`encode_and_measure` is one trip over a tensor: each range is encoded, and at once decoded and compared, while it lies
in the core's cache, or in the memory of the device that encoded it. What is compared is what the sink was given, from
memory; that the file holds the same is for the sink's hashes to show. Schemes that need several sweeps, and ranges that
are cut otherwise, are measured afterwards from what the sink reads back. Either way the same ranges are added in the
same order: on the CPU the error is the same to the last bit, while a device's sums differ in their last digits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from loaders.clock import Clock
from loaders.dtypes import GGML_BLOCKS, WEIGHT_DTYPES, DType, Shape, storage_of
from loaders.quantization.grid import Grid
from loaders.quantization.kernels import ComparingKernels, Kernels, compare, cpu
from loaders.quantization.kernels.cpu import kernel_input
from loaders.quantization.read_only.ggml import decode_blocks
from loaders.quantization.scheme import (
    Block,
    Bounded,
    Compared,
    DecodedOnDevice,
    Gridded,
    RangeEncoder,
    Scheme,
    Sink,
    Stored,
    View,
    Work,
    fits,
)
from loaders.quantization.schemes.plain import Plain
from loaders.specs import StoredSpec, TensorSpec
from loaders.stats import ErrorSums

INNER = 1 << 18  # weights decoded at once, 1 MiB of float32: they stay in the cache until they are compared
T = TypeVar("T")


class Parts(Sink, Stored, Protocol):
    """The parts of a tensor, to be written and read back: in a file being written, or in memory."""


def encode_and_measure(
    view: View,
    cast: Callable[[View], View],
    scheme: Scheme,
    stored: Mapping[str, StoredSpec],
    parts: Parts,
    work: Work,
    on_bytes: Callable[[int], None],
    clock: Clock,
) -> ErrorSums:
    """Encode a tensor into `parts` and return the error of what was stored.

    `view` are the source's weights, with which it is compared; `cast` makes of it the view that the scheme encodes;
    `stored` are the specs of the parts, by role. `on_bytes` is called with the source bytes of each range once it was
    compared.
    """
    kept = _Kept()
    source, seen = _KeptView(view, kept), cast(_KeptView(view, kept))
    comparison = Comparison(scheme, view.spec, seen.spec, work)
    sums: dict[tuple[int, int], np.ndarray] = {}

    def compare_range(start: int, stop: int) -> np.ndarray:
        if (start, stop) not in sums:
            with clock.phase("measure"):
                block = source.read(start, stop)
                sums[start, stop] = comparison.sums(block, kept_parts, start, stop)
            on_bytes(block.nbytes)
        return sums[start, stop]

    ranges = work.ranges(view.spec.num_items, comparison.align)
    kept_parts = _KeptParts(parts, stored, kept)
    by_range = fits(scheme, RangeEncoder) and scheme.range_align(seen.spec) is not None
    scheme.encode(seen, kept_parts, _Sweeps(work, kept, clock, compare_range, frozenset(ranges if by_range else ())))
    if len(sums) < len(ranges):
        work.sweep(view.spec.num_items, comparison.align, compare_range)
    return added(view.spec, (sums[each] for each in ranges))


def measure(
    view: View, scheme: Scheme, spec: TensorSpec, stored: Stored, work: Work, on_bytes: Callable[[int], None]
) -> ErrorSums:
    """Measure one tensor. An error2 of infinity says that a single weight came back wrong.

    `spec` is what the scheme encoded: the view's spec, or that of its cast. `on_bytes` is called with the source bytes
    of each range once it was compared.
    """
    comparison = Comparison(scheme, view.spec, spec, work)

    def compare_range(start: int, stop: int) -> np.ndarray:
        block = view.read(start, stop)
        sums = comparison.sums(block, stored, start, stop)
        on_bytes(block.nbytes)
        return sums

    return added(view.spec, work.sweep(view.spec.num_items, comparison.align, compare_range))


def added(source: TensorSpec, ranges: Iterable[np.ndarray]) -> ErrorSums:
    """Return the error of a tensor from the sums over its ranges, which are added in this order."""
    total = compare.new_sums()
    for sums in ranges:
        compare.merge(total, sums)
    return compare.error_sums(source.numel, total)


class Comparison:
    """The comparison of any range of a tensor with what was stored for it.

    `source` is the spec of the weights that are compared; `spec` is what the scheme encoded, which differs by a cast.
    `align` is the number of items at whose multiples ranges are cut.
    """

    def __init__(self, scheme: Scheme, source: TensorSpec, spec: TensorSpec, work: Work) -> None:
        self._scheme = scheme
        self._source = source
        self._spec = spec
        self._work = work
        self._compared = scheme if fits(scheme, Compared) else None
        self._on_device = scheme if fits(scheme, DecodedOnDevice) else None
        self._kernels = work.kernels if fits(work.kernels, ComparingKernels) else None
        self._gridded = scheme if fits(scheme, Gridded) else None
        self._bounded = scheme if fits(scheme, Bounded) else None
        self._is_copy = isinstance(scheme, Plain) and scheme.dtype in (None, source.dtype.name)
        align = scheme.align(spec)
        self._inner = -(-INNER // align) * align
        by_range = scheme.range_align(spec) if fits(scheme, RangeEncoder) else None
        self.align = by_range or align

    def sums(self, block: np.ndarray, stored: Stored, start: int, stop: int) -> np.ndarray:
        """Return the sums of kernels/compare.py over items [start, stop). block: their raw weights (stop - start,)."""
        sums = compare.new_sums()
        if self._is_copy:
            self._compare_copy(block, stored.read("weight", start, stop), sums)
            return sums
        given = block, stored, start, stop, sums
        if not (self._compare_on_device(*given) or self._compare_at_once(*given)):
            self._decode_and_compare(*given)
        if self._bounded is not None and not sums[compare.NONFINITE]:
            _check_each(sums, self._bounded.greatest_error(self._spec, stored, start, stop))
        return sums

    def _compare_copy(self, block: np.ndarray, copy: np.ndarray, sums: np.ndarray) -> None:
        """Compare a copy, which is exact or wrong. Blocks of ggml count by the weights that they stand for."""
        dtype = self._source.dtype
        if not _same_bits(block, copy):
            sums[compare.WRONG] = 1
        elif dtype.name in WEIGHT_DTYPES:
            cpu.scan_into(block, dtype.name, sums)
        elif dtype.name in GGML_BLOCKS:
            size = dtype.size((dtype.block,))
            step = INNER // dtype.block * size
            for at in range(0, block.size, step):
                part = block[at : at + step]
                weights = self._work.array("compared", part.size // size * dtype.block, np.float32)
                decode_blocks(dtype.name, part, weights)
                cpu.scan_into(weights, "F32", sums)

    def _compare_on_device(self, block: np.ndarray, stored: Stored, start: int, stop: int, sums: np.ndarray) -> bool:
        """Compare on the device that encoded just these weights, if there is one; else do nothing and return False."""
        kernels, scheme, gridded = self._kernels, self._on_device, self._gridded
        if kernels is None or scheme is None or not kernels.keeps(block):
            return False
        wanted = scheme.parts_on_device(self._spec, start, stop)
        if wanted is None:
            return False
        parts = [stored.read(*each) for each in wanted]
        decoder = _Decoder(scheme, self._spec.dtype, self._spec.shape[1:], stop - start, self._spec)
        grid = None if gridded is None else gridded.grid(self._spec, stored, start, stop)
        kernels.compare(block, self._source.dtype.name, parts, decoder, grid, sums)
        return True

    def _compare_at_once(self, block: np.ndarray, stored: Stored, start: int, stop: int, sums: np.ndarray) -> bool:
        """Compare in the scheme's own call, if it has one; else do nothing and return False."""
        scheme, source = self._compared, self._source.dtype.name
        return scheme is not None and scheme.compare(self._spec, stored, start, stop, block, source, sums)

    def _decode_and_compare(self, block: np.ndarray, stored: Stored, start: int, stop: int, sums: np.ndarray) -> None:
        dtype = self._source.dtype.name
        for at in range(start, stop, self._inner):
            end = min(at + self._inner, stop)
            decoded = self._work.array("compared", end - at, np.float32)
            self._scheme.decode(self._spec, stored, at, end, decoded, self._work)
            part = block[at - start : end - start]
            cpu.compare_into(part, dtype, decoded, sums)
            # A NaN in the source may spoil the scale of its whole group, so bounds by scales say nothing there.
            if self._gridded is not None and not sums[compare.NONFINITE]:
                self._check_grid(part, decoded, self._gridded.grid(self._spec, stored, at, end), sums)

    def _check_grid(self, block: np.ndarray, decoded: np.ndarray, grid: Grid | None, sums: np.ndarray) -> None:
        """Make the error infinite if a weight is not the nearest that its stored scale allows: it was encoded wrong."""
        if grid is not None and self._source.dtype != self._spec.dtype:
            grid = grid.after_cast()
        if grid is not None and not grid.holds(kernel_input(block, self._source.dtype.name), decoded):
            sums[compare.WRONG] = 1


@dataclass(frozen=True)
class _Decoder:
    """A scheme's decoder on a device for ranges of one length; equal for all tensors of the same dtype and rows."""

    scheme: DecodedOnDevice
    dtype: DType
    row: Shape
    count: int
    spec: TensorSpec = field(compare=False)

    def __call__(self, parts: Sequence[Any]) -> Any:
        return self.scheme.decode_on_device(self.spec, parts, self.count)


def _check_each(sums: np.ndarray, greatest: float) -> None:
    """Count the range as wrong if a weight is further off than the stored scales allow."""
    if sums[compare.MAX_ERROR] > greatest:
        sums[compare.WRONG] = 1


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare bits rather than values, so that NaN equals NaN and -0 differs from 0; by words, eight bytes at once."""
    if one.nbytes != other.nbytes:
        return False
    a, b, words = one.view(np.uint8), other.view(np.uint8), one.nbytes // 8 * 8
    same_words = a[:words].view(np.uint64) == b[:words].view(np.uint64)
    return bool(same_words.all()) and np.array_equal(a[words:], b[words:])


class _Kept(threading.local):
    """What a thread read and wrote in the range that it is encoding: by slot of the view, and by role."""

    def __init__(self) -> None:
        self.is_open = False
        self.blocks: dict[int, tuple[tuple[int, int], Block]] = {}
        self.parts: dict[str, tuple[int, np.ndarray]] = {}

    def begin(self) -> None:
        self.is_open = True

    def end(self) -> None:
        self.is_open = False
        self.blocks.clear()
        self.parts.clear()


class _KeptView:
    """A view that gives a range again as it was read, so that what is decoded or gathered is so once."""

    def __init__(self, view: View, kept: _Kept) -> None:
        self.spec = view.spec
        self._view = view
        self._kept = kept

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        if not self._kept.is_open:
            return self._view.read(start, stop, slot)
        known = self._kept.blocks.get(slot)
        if known is None or known[0] != (start, stop):
            known = self._kept.blocks[slot] = (start, stop), self._view.read(start, stop, slot)
        return known[1]


class _KeptParts:
    """Parts that give what was written in a range from memory, and anything else as they read it back."""

    def __init__(self, parts: Parts, stored: Mapping[str, StoredSpec], kept: _Kept) -> None:
        self._parts = parts
        self._storages = {role: storage_of(spec.dtype) for role, spec in stored.items()}
        self._kept = kept

    def write(self, role: str, start: int, data: Block) -> None:
        self._parts.write(role, start, data)
        if self._kept.is_open:
            self._kept.parts[role] = start * data.itemsize, data

    def read(self, role: str, start: int, stop: int) -> Block:
        storage = self._storages[role]
        if (known := self._kept.parts.get(role)) is not None:
            offset, data = known
            first, last = start * storage.itemsize - offset, stop * storage.itemsize - offset
            if first >= 0 and last <= data.nbytes and data.flags.c_contiguous:
                return data.reshape(-1).view(np.uint8)[first:last].view(storage)
        return self._parts.read(role, start, stop)


class _Sweeps:
    """A scheme's tools, whose sweeps measure each range of `expected` once the scheme's body is through with it."""

    def __init__(
        self,
        work: Work,
        kept: _Kept,
        clock: Clock,
        compare: Callable[[int, int], Any],
        expected: frozenset[tuple[int, int]],
    ) -> None:
        self._work = work
        self._kept = kept
        self._clock = clock
        self._compare = compare
        self._expected = expected
        self._keeping = work.kernels.keeping if fits(work.kernels, ComparingKernels) else nullcontext

    @property
    def kernels(self) -> Kernels:
        return self._work.kernels

    def array(self, name: str, count: int, dtype: Any) -> np.ndarray:
        return self._work.array(name, count, dtype)

    def ranges(self, count: int, align: int) -> Sequence[tuple[int, int]]:
        return self._work.ranges(count, align)

    def sweep(self, count: int, align: int, body: Callable[[int, int], T]) -> list[T]:
        if self._kept.is_open:  # a sweep inside of a range
            return self._work.sweep(count, align, body)

        def in_one_trip(start: int, stop: int) -> T:
            is_expected = (start, stop) in self._expected
            self._kept.begin()
            try:
                with self._keeping() if is_expected else nullcontext():
                    with self._clock.phase("encode"):
                        result = body(start, stop)
                    if self._kept.parts and is_expected:
                        self._compare(start, stop)
                return result
            finally:
                self._kept.end()

        return self._work.sweep(count, align, in_one_trip)
