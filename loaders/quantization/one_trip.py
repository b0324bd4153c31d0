"""One trip over a tensor: each range is encoded, and at once decoded and compared, while it lies in the core's cache.

What is compared is what the sink was given, from memory; that the file holds the same is for the sink's hashes to show.
Schemes that need several sweeps, and ranges that are cut otherwise, are measured afterwards from what the sink reads
back. Either way the same ranges are added in the same order, so that the error is the same to the last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from loaders.clock import Clock
from loaders.dtypes import storage_of
from loaders.quantization.kernels import Kernels
from loaders.quantization.measure import Comparison, added
from loaders.quantization.scheme import Block, RangeEncoder, Scheme, Sink, Stored, View, Work, fits
from loaders.specs import StoredSpec
from loaders.stats import ErrorSums

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

    def compare(start: int, stop: int) -> np.ndarray:
        if (start, stop) not in sums:
            with clock.phase("measure"):
                block = source.read(start, stop)
                sums[start, stop] = comparison.sums(block, memory, start, stop)
            on_bytes(block.nbytes)
        return sums[start, stop]

    ranges = work.ranges(view.spec.num_items, comparison.align)
    memory = _KeptParts(parts, stored, kept)
    by_range = fits(scheme, RangeEncoder) and scheme.range_align(seen.spec) is not None
    scheme.encode(seen, memory, _Sweeps(work, kept, clock, compare, frozenset(ranges if by_range else ())))
    if len(sums) < len(ranges):
        work.sweep(view.spec.num_items, comparison.align, compare)
    return added(view.spec, (sums[each] for each in ranges))


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
            self._kept.begin()
            try:
                with self._clock.phase("encode"):
                    result = body(start, stop)
                if self._kept.parts and (start, stop) in self._expected:
                    self._compare(start, stop)
                return result
            finally:
                self._kept.end()

        return self._work.sweep(count, align, in_one_trip)
