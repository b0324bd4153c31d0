"""Fetching what readers will need, in the order of its use, by requests side by side and within a budget of memory.

A reader announces uses (`Use`), whose bytes are cut into segments: what one request fetches. Neighbours in a file share
a request, however small they are. A segment is fetched once, and freed when all uses of it are over; if its uses read
each byte only once, as soon as that has happened.

The budget is of the process, for all its readers. A half is for what steps hold that read bytes several times (`Use`s
that are not `is_once`): a step whose bytes do not fit beside those of others waits, and one whose bytes never fit has
them in a scratch file, one such step at a time. A quarter, or three if no reader has such steps, is for what is fetched
ahead. The rest is for what threads wait for and was not fetched ahead, which is a few segments for each.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import cache
from itertools import pairwise

import numpy as np

from loaders.backends.threads import Stopped
from loaders.errors import BadCheckpoint
from loaders.storage.base import PinnedFiles, Range
from loaders.storage.settings import current
from loaders.strategies.base import Use
from loaders.strategies.reading.sparse_memory import PAGE, ScratchMemory, SparseMemory

# Bytes of one request at most. At 100 ms of latency and 100 MB/s per connection, 8 MiB spend as long on data as on
# waiting; much larger ones leave fewer to run side by side within the budget.
SEGMENT = 16 << 20
SEGMENTS_IN_BUDGET = 32  # so that small budgets, too, have room for requests side by side
# Bytes between two neighbours that one request fetches along, since formats pad and name what they store. More could be
# another tensor, which would be fetched twice.
GAP = 256
LOOK_S = 0.5  # seconds between two looks whether a thread that waits for bytes should stop


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


class Fetcher:
    """The requests of a process for readers that share a budget of bytes."""

    def __init__(self, budget: int) -> None:
        self.segment_bytes = max(PAGE, min(SEGMENT, budget // SEGMENTS_IN_BUDGET // PAGE * PAGE))
        # What a request has fetched is copied to its place, one after another, so that one is there twice.
        self.budget = max(4 * PAGE, budget - self.segment_bytes)
        self.changed = threading.Condition()
        self._copying = threading.Lock()
        self._readers: list[Ahead] = []
        self._wanted: deque[tuple[Ahead, Segment]] = deque()
        self._threads = 0
        self._ahead_bytes = 0
        self._begun: dict[Use, tuple[int, int]] = {}  # bytes in memory and in scratch of uses that keep them
        self.inside: Counter[int] = Counter()  # by thread, how many of these it is in

    # --- readers, with the lock held

    def join(self, reader: Ahead) -> None:
        self._readers.append(reader)
        self._start()

    def leave(self, reader: Ahead) -> None:
        if reader in self._readers:
            self._readers.remove(reader)

    def want(self, reader: Ahead, segments: Iterable[Segment]) -> None:
        """Have segments fetched before all that nobody waits for."""
        for segment in segments:
            self.touch(reader, segment)
            if segment.state is State.GONE:
                # It was freed too early, or never announced; it is kept from now on.
                segment.state, segment.is_kept = State.WAITING, True
            if segment.state is State.WAITING:
                self._wanted.append((reader, segment))
        self._start()

    def touch(self, reader: Ahead, segment: Segment) -> None:
        """Count a segment no longer as one that nobody has asked for."""
        if segment.is_ahead:
            segment.is_ahead = False
            reader.ahead_bytes -= segment.size
            self._ahead_bytes -= segment.size
            self._start()

    def drop(self, reader: Ahead, segment: Segment) -> None:
        self.touch(reader, segment)
        was_there = segment.state is State.THERE
        segment.state = State.GONE
        if was_there:
            segment.run.drop(segment)

    def admit(self, use: Use, in_memory: int, in_scratch: int, stop: threading.Event | None) -> None:
        """Wait until the bytes of a use fit beside those of other uses that have begun and keep theirs.

        A thread that is in another use does not wait, since others may wait for that one's end.
        """
        me = threading.get_ident()

        def fits() -> bool:
            if self.inside[me]:
                return True
            memory = sum(taken for taken, _ in self._begun.values()) + in_memory
            scratch = any(taken for _, taken in self._begun.values())
            return not self._begun or (memory <= self.budget // 2 and not (scratch and in_scratch))

        self.wait(fits, stop)
        self._begun[use] = in_memory, in_scratch
        self.changed.notify_all()

    def is_admitted(self, use: Use) -> bool:
        return use in self._begun

    def dismiss(self, use: Use) -> None:
        self._begun.pop(use, None)
        self.changed.notify_all()

    def wait(self, until: Callable[[], bool], stop: threading.Event | None) -> None:
        while not self.changed.wait_for(until, None if stop is None else LOOK_S):
            if stop is not None and stop.is_set():
                raise Stopped("stopped")

    # --- requests

    def _start(self) -> None:
        while self._threads < current().at_once and (found := self._next()) is not None:
            self._threads += 1
            # A thread that waits for a server must not keep the process from ending.
            threading.Thread(target=self._work, args=found, name="fetch", daemon=True).start()

    def _next(self) -> tuple[Ahead, Segment] | None:
        """Take the next segment to fetch: one that is waited for, else the first of who has least ahead."""
        while self._wanted:
            reader, segment = self._wanted.popleft()
            if segment.state is State.WAITING:
                segment.state = State.UNDER_WAY
                return reader, segment
        share = 1 if any(reader.keeps for reader in self._readers) else 3
        for reader in sorted(self._readers, key=lambda each: each.ahead_bytes):
            found = reader.upcoming()
            if found is not None and self._ahead_bytes + found.size <= self.budget * share // 4:
                found.state, found.is_ahead = State.UNDER_WAY, True
                reader.ahead_bytes += found.size
                self._ahead_bytes += found.size
                return reader, found
        return None

    def _work(self, reader: Ahead, segment: Segment) -> None:
        while True:
            error: Exception | None = None
            try:
                self._fetch(reader, segment)
            except Exception as raised:  # raised again on each thread that needs the segment
                error = raised
            with self.changed:
                self._settle(reader, segment, error)
                found = self._next()
                if found is None:
                    self._threads -= 1
                    return
                reader, segment = found

    def _fetch(self, reader: Ahead, segment: Segment) -> None:
        file = segment.run.file
        data = reader.files.read(file, segment.start, segment.stop)
        if len(data) != segment.size:
            raise BadCheckpoint(
                f"{file}: expected {segment.size} bytes from byte {segment.start} on, found {len(data)}; try again"
            )
        with self._copying:
            if segment.state is State.UNDER_WAY:
                segment.run.put(segment, data)

    def _settle(self, reader: Ahead, segment: Segment, error: Exception | None) -> None:
        if segment.state is State.GONE:  # nobody needs it any more
            segment.run.drop(segment)
        elif error is not None:
            segment.state, segment.error = State.FAILED, error
            reader.forget_ahead()
        else:
            segment.state = State.THERE
        self.changed.notify_all()


@cache
def fetcher(budget: int) -> Fetcher:
    """Return the process's fetcher with a budget."""
    return Fetcher(budget)


class Ahead:
    """The announced bytes of one reader."""

    def __init__(self, files: PinnedFiles, shared: Fetcher) -> None:
        self.files = files
        self.ahead_bytes = 0  # of segments that were fetched and nobody has asked for yet
        self.keeps = False  # whether uses read bytes several times
        self._shared = shared
        self._stop: threading.Event | None = None
        self._runs: dict[str, list[Run]] = {}
        self._queue: deque[Segment] = deque()
        self._steps: dict[Use, int] = {}
        self._begun: set[Use] = set()
        self._loans: dict[tuple[int, int], list[Segment]] = {}

    def close(self) -> None:
        with self._shared.changed:
            self._shared.leave(self)
            for use in self._begun:
                self._shared.dismiss(use)
            for run in (run for runs in self._runs.values() for run in runs):
                for segment in run.segments:
                    self._shared.drop(self, segment)
            self._runs.clear()
            self._queue.clear()

    # --- announcing

    def expect(self, uses: Sequence[Use], stop: threading.Event | None) -> None:
        with self._shared.changed:
            self._stop = stop
            made = self._new_runs(uses)
            for place, use in enumerate(uses):
                self._steps[use] = use.steps
                for segment, start, end in self._parts(use):
                    segment.place = min(segment.place, place) if segment.uses else place
                    segment.uses += 1
                    segment.unread += end - start
                    segment.is_kept = segment.is_kept or not use.is_once
                    self.keeps = self.keeps or not use.is_once
            segments = [segment for run in made if not run.in_scratch for segment in run.segments]
            self._queue.extend(sorted(segments, key=lambda each: each.place))
            self._shared.leave(self)
            self._shared.join(self)

    def _new_runs(self, uses: Sequence[Use]) -> list[Run]:
        """Return runs of what is not announced yet; neighbours are one, unless only one of them goes to scratch."""
        wanted: dict[str, list[tuple[int, int, bool]]] = {}
        for use in uses:
            is_large = not use.is_once and sum(piece.size for piece in use.pieces) > self._shared.budget // 2
            for piece in use.pieces:
                start, stop = piece.spec.offset + piece.start, piece.spec.offset + piece.stop
                if start < stop:
                    wanted.setdefault(piece.spec.file, []).append((start, stop, is_large))
        made = []
        for file, ranges in wanted.items():
            known = [(run.start, run.stop) for run in self._runs.get(file, ())]
            for start, stop, in_scratch in joined(without(ranges, known), known):
                run = Run(file, start, stop, in_scratch=in_scratch)
                run.cut(self._shared.segment_bytes)
                made.append(run)
            own = [*self._runs.get(file, ()), *(run for run in made if run.file == file)]
            self._runs[file] = sorted(own, key=lambda run: run.start)
        return made

    def _parts(self, use: Use) -> Iterator[tuple[Segment, int, int]]:
        """Yield the segments that a use needs, and the range of each."""
        for piece in use.pieces:
            first, last = piece.spec.offset + piece.start, piece.spec.offset + piece.stop
            for run in self._runs.get(piece.spec.file, ()):
                if run.start < last and first < run.stop:
                    for segment in run.between(max(first, run.start), min(last, run.stop)):
                        yield segment, max(first, segment.start), min(last, segment.stop)

    def upcoming(self) -> Segment | None:
        """Return the next segment to fetch ahead."""
        while self._queue and self._queue[0].state is not State.WAITING:
            self._queue.popleft()
        return self._queue[0] if self._queue else None

    def forget_ahead(self) -> None:
        """Fetch nothing more ahead: a request has failed, and the reader's work will, too."""
        self._queue.clear()

    # --- using

    @contextmanager
    def using(self, use: Use) -> Iterator[None]:
        self._begin(use)
        try:
            yield
        finally:
            with self._shared.changed:
                self._shared.inside[threading.get_ident()] -= not use.is_once
                self._end(use)

    def _begin(self, use: Use) -> None:
        with self._shared.changed:
            if not use.is_once:
                self._admit(use)
                self._shared.inside[threading.get_ident()] += 1

    def _admit(self, use: Use) -> None:
        if use in self._begun:  # by another of its steps, which may still wait
            self._shared.wait(lambda: self._shared.is_admitted(use), self._stop)
        elif use in self._steps:
            self._begun.add(use)
            segments = list(dict.fromkeys(segment for segment, _, _ in self._parts(use)))
            in_scratch = sum(segment.size for segment in segments if segment.run.in_scratch)
            in_memory = sum(segment.size for segment in segments) - in_scratch
            self._shared.admit(use, in_memory, in_scratch, self._stop)
            self._shared.want(self, segments)

    def _end(self, use: Use) -> None:
        if use not in self._steps:
            return
        self._steps[use] -= 1
        if self._steps[use]:
            return
        del self._steps[use]
        self._begun.discard(use)
        for segment, _, _ in self._parts(use):
            segment.uses -= 1
            if not segment.uses:
                self._shared.drop(self, segment)
        self._shared.dismiss(use)

    # --- reading

    def read(self, file: str, start: int, stop: int, slot: int | None) -> np.ndarray | None:
        """Return announced bytes [start, stop) of a file, once they are there; None if they were not announced.

        They stay valid until the thread reads into the slot again; without a slot, until their use is over.
        """
        with self._shared.changed:
            run = self._run(file, start, stop)
            if run is None:
                return None
            loan = threading.get_ident(), -1 if slot is None else slot
            self._give_back(loan)
            segments = run.between(start, stop)
            self._shared.want(self, segments)
            self._shared.wait(lambda: all(s.state in (State.THERE, State.FAILED) for s in segments), self._stop)
            for segment in segments:
                if segment.error is not None:
                    raise segment.error
                if slot is None:
                    segment.is_kept = True
                segment.loans += 1
                segment.unread -= min(stop, segment.stop) - max(start, segment.start)
            self._loans[loan] = segments
            return run.array(start, stop)

    def _run(self, file: str, start: int, stop: int) -> Run | None:
        runs = self._runs.get(file, [])
        index = bisect_right(runs, start, key=lambda run: run.start) - 1
        return runs[index] if index >= 0 and stop <= runs[index].stop else None

    def _give_back(self, loan: tuple[int, int]) -> None:
        for segment in self._loans.pop(loan, ()):
            segment.loans -= 1
            is_read = segment.unread <= 0 and not segment.loans and not segment.is_kept
            if is_read and segment.state is State.THERE:
                self._shared.drop(self, segment)


def without(ranges: Iterable[tuple[int, int, bool]], known: Sequence[Range]) -> Iterator[tuple[int, int, bool]]:
    """Yield what of ranges is in none of the known ones, which are sorted and do not overlap."""
    for start, stop, mark in ranges:
        for first, last in known:
            if first < stop and start < last:
                if start < first:
                    yield start, first, mark
                start = last
        if start < stop:
            yield start, stop, mark


def joined(ranges: Iterable[tuple[int, int, bool]], known: Sequence[Range] = ()) -> Iterator[tuple[int, int, bool]]:
    """Yield ranges without overlaps, in order; overlaps have any's mark, and neighbours with the same mark are one.

    Neighbours have at most GAP bytes between them, and none of the known ranges.
    """
    found: list[tuple[int, int, bool]] = []
    for start, stop, mark in sorted(ranges):
        if found and start < found[-1][1]:
            first, last, before = found.pop()
            found.append((first, max(last, stop), mark or before))
        else:
            found.append((start, stop, mark))
    whole: tuple[int, int, bool] | None = None
    for start, stop, mark in found:
        if whole is not None:
            is_near = start - whole[1] <= GAP and not any(whole[1] <= first < start for first, _ in known)
            if is_near and mark == whole[2]:
                whole = whole[0], stop, mark
                continue
            yield whole
        whole = start, stop, mark
    if whole is not None:
        yield whole
