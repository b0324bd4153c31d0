"""Fetching ahead into the page cache, for readers that are asked from any thread, in roughly a known order."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from loaders.errors import WeightmillError
from loaders.specs import WeightSpec
from loaders.strategies.reading.open_files import OpenFiles
from loaders.strategies.reading.thread_tuning import Workers

RANGE = 1 << 20  # bytes fetched at once: with more, threads work on parts so far apart that the kernel reads less ahead
MOST_THREADS = 8  # they wait for the disk and copy nothing, however few CPUs there are


class CacheAhead:
    """Threads that have the kernel bring what comes next into the page cache, in the order of `specs`.

    They start with `begin`, or at the first range that is asked for, and stay within `window` bytes of the furthest.
    """

    def __init__(self, files: OpenFiles, specs: Sequence[WeightSpec], window: int, workers: Workers) -> None:
        self._files = files
        self._window = window
        self._workers = workers
        self._begins: dict[str, int] = {}
        self._ranges: list[tuple[int, WeightSpec, int, int]] = []
        total = 0
        for spec in specs:
            if spec.name in self._begins:
                continue
            self._begins[spec.name] = total
            for start in range(0, spec.size, RANGE):
                self._ranges.append((total + start, spec, start, min(start + RANGE, spec.size)))
            total += spec.size
        self._next = 0
        self._reached = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def covers(self, specs: Sequence[WeightSpec]) -> bool:
        """Whether all of these are among what is fetched."""
        return all(spec.name in self._begins for spec in specs)

    def begin(self) -> None:
        """Start the threads, if there is anything to fetch."""
        with self._changed:
            if not self._threads and not self._stopped and self._ranges:
                for _ in range(min(MOST_THREADS, self._workers.most)):
                    self._threads.append(threading.Thread(target=self._fetch, name="cache-ahead", daemon=True))
                    self._threads[-1].start()

    def reached(self, spec: WeightSpec, stop: int) -> None:
        """Note that a range up to byte `stop` of a tensor is being read, so that what follows may be fetched."""
        at = self._begins.get(spec.name, 0) + stop
        if at <= self._reached:  # looked at without the lock, which most reads then need not take
            return
        with self._changed:
            self._reached = max(self._reached, at)
            self._changed.notify_all()
        self.begin()

    def _fetch(self) -> None:
        while (found := self._take()) is not None:
            _, spec, start, stop = found
            try:
                with self._workers.reading(stop - start):
                    self._files.fetch(spec, start, stop)
            except (WeightmillError, OSError):
                return  # the reader of this range meets the same error, and reports it

    def _take(self) -> tuple[int, WeightSpec, int, int] | None:
        """Wait until the next range is within the window, and take it; None when there is nothing left to do."""
        with self._changed:
            while not self._stopped:
                if self._next >= len(self._ranges):
                    return None
                if self._ranges[self._next][0] <= self._reached + self._window:
                    self._next += 1
                    return self._ranges[self._next - 1]
                self._changed.wait()
            return None

    def stop(self) -> None:
        """End the threads and wait for them, so that the files they read may be closed."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
