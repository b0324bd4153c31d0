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

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import cache

from loaders.backends.threads import Stopped
from loaders.errors import BadCheckpoint
from loaders.storage.read_limit import before_reading
from loaders.storage.settings import current
from loaders.strategies.base import Use
from loaders.strategies.reading.announced import Ahead
from loaders.strategies.reading.segments import SEGMENT, Segment, State
from loaders.strategies.reading.sparse_memory import PAGE

LOOK_S = 0.5  # seconds between two looks whether a thread that waits for bytes should stop
SEGMENTS_IN_BUDGET = 32  # so that small budgets, too, have room for requests side by side


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

    @property
    def most_kept(self) -> int:
        """The bytes in memory of uses that keep theirs; a larger use has them in a scratch file."""
        return self.budget // 2

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
            return not self._begun or (memory <= self.most_kept and not (scratch and in_scratch))

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
        before_reading(segment.size)
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
