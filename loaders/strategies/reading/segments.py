"""What a reader fetches: runs of a file's bytes without gaps, cut into segments, each of which one request fetches."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum, auto
from itertools import pairwise

import numpy as np

from loaders.storage.base import Range
from loaders.storage.settings import current
from loaders.strategies.reading.sparse_memory import PAGE, ScratchMemory, SparseMemory

# Bytes of one request at most. At 100 ms of latency and 100 MB/s per connection, 10 MB spend as long on data as on
# waiting; much larger ones leave fewer to run side by side within the budget.
SEGMENT = 16 << 20

Marked = tuple[int, int, int]  # bytes [start, stop), and a number that keeps what differs in it apart


class State(Enum):
    WAITING = auto()
    UNDER_WAY = auto()
    THERE = auto()
    FAILED = auto()
    GONE = auto()


class Segment:
    """A range of a file that one request fetches. Its fields are guarded by the fetcher's lock."""

    __slots__ = ("error", "is_ahead", "is_kept", "loans", "place", "run", "start", "state", "stop", "unread", "uses")

    def __init__(self, run: Run, start: int, stop: int) -> None:
        self.run = run
        self.start = start  # in the file
        self.stop = stop
        self.place = 0  # of the first use
        self.state = State.WAITING
        self.error: Exception | None = None
        self.uses = 0  # that are not over
        self.is_kept = False  # until then, since some read bytes several times
        self.unread = 0  # bytes that uses, each reading its own once, have not read yet
        self.loans = 0  # to threads, whose arrays lie in it
        self.is_ahead = False  # fetched, or being fetched, before anybody asked

    @property
    def size(self) -> int:
        return self.stop - self.start


class Run:
    """A run of bytes of a file without gaps, of which segments are fetched into one piece of memory."""

    def __init__(self, file: str, start: int, stop: int, *, in_scratch: bool) -> None:
        self.file = file
        self.start = start
        self.stop = stop
        self.in_scratch = in_scratch
        self.segments: list[Segment] = []
        self._memory: SparseMemory | ScratchMemory | None = None

    def cut(self, most: int) -> None:
        size = self.stop - self.start
        each = math.ceil(size / math.ceil(size / most))
        step = math.ceil(each / PAGE) * PAGE
        cuts = [*range(self.start, self.stop, step), self.stop]
        self.segments = [Segment(self, *ends) for ends in pairwise(cuts)]
        self._starts = cuts[:-1]

    def between(self, start: int, stop: int) -> list[Segment]:
        """Return the segments of bytes [start, stop) of the file."""
        first = bisect_right(self._starts, start) - 1
        return self.segments[first : bisect_right(self._starts, max(start, stop - 1))]

    @property
    def memory(self) -> SparseMemory | ScratchMemory:
        if self._memory is None:
            size = self.stop - self.start
            self._memory = ScratchMemory(size, current().scratch) if self.in_scratch else SparseMemory(size)
        return self._memory

    def put(self, segment: Segment, data: memoryview) -> None:
        self.memory.put(segment.start - self.start, data)

    def array(self, start: int, stop: int) -> np.ndarray:
        found: np.ndarray = self.memory.array[start - self.start : stop - self.start]
        return found

    def drop(self, segment: Segment) -> None:
        if self._memory is not None:
            self._memory.drop(segment.start - self.start, segment.stop - self.start)
        if all(each.state in (State.GONE, State.FAILED) for each in self.segments):
            self._memory = None


def without(ranges: Iterable[Marked], known: Sequence[Range]) -> Iterator[Marked]:
    """Yield what of ranges is in none of the known ones, which are sorted and do not overlap."""
    for start, stop, mark in ranges:
        for first, last in known:
            if first < stop and start < last:
                if start < first:
                    yield start, first, mark
                start = last
        if start < stop:
            yield start, stop, mark


def joined(ranges: Iterable[Marked]) -> Iterator[Marked]:
    """Yield ranges without overlaps, in order; overlaps have any's mark, and neighbours with the same mark are one."""
    found: list[Marked] = []
    for start, stop, mark in sorted(ranges):
        if found and start < found[-1][1]:
            first, last, before = found.pop()
            found.append((first, max(last, stop), max(mark, before)))
        else:
            found.append((start, stop, mark))
    whole: Marked | None = None
    for start, stop, mark in found:
        if whole is not None and (start, mark) == whole[1:]:
            whole = whole[0], stop, mark
            continue
        if whole is not None:
            yield whole
        whole = start, stop, mark
    if whole is not None:
        yield whole
