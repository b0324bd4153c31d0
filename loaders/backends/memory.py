"""The memory that a piece of work held: anonymous memory, which unlike mapped files the kernel cannot take back.

And work without Python's search for garbage.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
INTERVAL_S = 0.02  # between two samples: shorter peaks may be missed, more samples cost time


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory now, or the peak of all resident memory outside of Linux."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
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


class PeakMemory:
    """A sampler of anonymous memory; `peak_bytes` is the most that was held beyond what there was at the start."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._start = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._start = anonymous_bytes()
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes() - self._start)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
