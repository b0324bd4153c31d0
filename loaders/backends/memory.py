"""The memory that a piece of work held: anonymous memory, which unlike mapped files the kernel cannot take back.

And work without Python's search for garbage.
"""

from __future__ import annotations

import gc
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar

STATM = Path("/proc/self/statm")
INTERVAL_S = 0.02  # between two samples: shorter peaks may be missed, more samples cost time


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory now, or the peak of all resident memory outside of Linux."""
    # Without descriptors it cannot be opened; what is only measured is no reason to fail.
    with suppress(OSError):
        _, resident, shared, *_ = STATM.read_bytes().split()  # pages
        return (int(resident) - int(shared)) * mmap.PAGESIZE
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def no_collection() -> Iterator[None]:
    """Make no search for cyclic garbage in the block, which makes many objects that stay, such as a plan's.

    Python searches all objects again whenever their number has grown by a quarter: a third of planning's time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def spared() -> Iterator[None]:
    """Leave what exists by now, such as a plan, out of searches for cyclic garbage in the block: it stays anyway.

    Each full search would go through all of it: a quarter of the time of a job of 18,000 small tensors.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class PeakMemory:
    """The peak of anonymous memory inside a context; `peak_bytes` is the most that was held beyond that at its start.

    One thread samples for all that are open, while there are any.
    """

    _open: ClassVar[set[PeakMemory]] = set()
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _sampler: ClassVar[tuple[threading.Thread, threading.Event] | None] = None  # the event ends the thread

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._start = 0

    def __enter__(self) -> PeakMemory:
        self._start = anonymous_bytes()
        with self._lock:
            self._open.add(self)
            if PeakMemory._sampler is None or not PeakMemory._sampler[0].is_alive():  # after a fork it is not
                end = threading.Event()
                thread = threading.Thread(target=self._sample, args=(end,), name="peak-memory", daemon=True)
                PeakMemory._sampler = thread, end
                thread.start()
        return self

    @classmethod
    def _sample(cls, end: threading.Event) -> None:
        while not end.wait(INTERVAL_S):
            with cls._lock:
                now = anonymous_bytes()
                for each in cls._open:
                    each._look(now)

    def _look(self, now: int) -> None:
        self.peak_bytes = max(self.peak_bytes, now - self._start)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._open.discard(self)
            ended, PeakMemory._sampler = (PeakMemory._sampler, None) if not self._open else (None, PeakMemory._sampler)
        if ended is not None:
            thread, end = ended
            end.set()
            thread.join()
        self._look(anonymous_bytes())
