"""The uses that a reader has announced: their segments, which threads read them, and when they are no longer needed."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from loaders.storage.base import PinnedFiles
from loaders.strategies.base import Use
from loaders.strategies.reading.segments import Marked, Run, Segment, State, joined, without

if TYPE_CHECKING:
    from loaders.strategies.reading.fetching import Fetcher


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
        """Return runs of what is not announced yet; neighbours are one, but for each use that goes to scratch."""
        wanted: dict[str, list[Marked]] = {}
        for number, use in enumerate(uses, 1):
            is_large = not use.is_once and use.size > self._shared.most_kept
            for piece in use.pieces:
                start, stop = piece.spec.offset + piece.start, piece.spec.offset + piece.stop
                if start < stop:
                    wanted.setdefault(piece.spec.file, []).append((start, stop, number if is_large else 0))
        made = []
        for file, ranges in wanted.items():
            known = [(run.start, run.stop) for run in self._runs.get(file, ())]
            for start, stop, mark in joined(without(ranges, known)):
                run = Run(file, start, stop, in_scratch=bool(mark))
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
