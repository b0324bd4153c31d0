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
from functools import cache
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from loaders.backends.machine import CGROUP

STATM = Path("/proc/self/statm")
OWN_CGROUP = Path("/proc/self/cgroup")
INTERVAL_S = 0.02  # between two samples: shorter peaks may be missed, more samples cost time
COUNTED_EVERY = 10  # samples for one of the cgroup, whose counters the kernel sums up when they are read


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory now, or the peak of all resident memory outside of Linux."""
    # Without descriptors it cannot be opened; what is only measured is no reason to fail.
    with suppress(OSError):
        _, resident, shared, *_ = STATM.read_bytes().split()  # pages
        return (int(resident) - int(shared)) * mmap.PAGESIZE
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak if sys.platform == "darwin" else peak * 1024


def working_set_bytes(folder: Path | None) -> int | None:
    """Return the memory of a cgroup as Kubernetes counts it, and `kubectl top` shows it; None if it cannot be read.

    That is what all its processes use and the cached files that were used lately: usage without inactive files
    (setWorkingSet of cadvisor's container/libcontainer/handler.go).
    """
    if folder is None:
        return None
    for usage, inactive in (("memory.current", b"inactive_file"), ("memory.usage_in_bytes", b"total_inactive_file")):
        with suppress(OSError, ValueError, KeyError):
            used = int((folder / usage).read_bytes())
            stat = dict(line.split() for line in (folder / "memory.stat").read_bytes().splitlines())
            return max(0, used - int(stat[inactive]))
    return None


def memory_cgroup(cgroups: Path = CGROUP, own: Path = OWN_CGROUP) -> Path | None:
    """Return the folder of the cgroup that counts this process's memory, of version 2 or 1; None if only the root does.

    In a container the path of its cgroup may lead nowhere, and then the root that it sees is the container's own.
    """
    with suppress(OSError, ValueError):
        for line in sorted(own.read_text().splitlines()):
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = cgroups / "memory" if controllers else cgroups
            for folder in (root / path.lstrip("/"), root):
                is_root = (folder / "release_agent").exists()  # of version 1; that of 2 has no memory.current
                if not is_root and working_set_bytes(folder) is not None:
                    return folder
    return None


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

    `peak_working_set_bytes` is the peak of what the process's cgroup counts, all of it; None without one.

    One thread samples for all that are open, while there are any.
    """

    _open: ClassVar[set[PeakMemory]] = set()
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _sampler: ClassVar[tuple[threading.Thread, threading.Event] | None] = None  # the event ends the thread

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.peak_working_set_bytes: int | None = None
        self._start = 0

    def __enter__(self) -> PeakMemory:
        self._start = anonymous_bytes()
        self._count(working_set_bytes(PeakMemory._group()))
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
        for sample in count():
            if end.wait(INTERVAL_S):
                return
            with cls._lock:
                now = anonymous_bytes()
                counted = None if sample % COUNTED_EVERY else working_set_bytes(cls._group())
                for each in cls._open:
                    each._look(now)
                    each._count(counted)

    @staticmethod
    @cache
    def _group() -> Path | None:
        return memory_cgroup()

    def _look(self, now: int) -> None:
        self.peak_bytes = max(self.peak_bytes, now - self._start)

    def _count(self, now: int | None) -> None:
        if now is not None:
            self.peak_working_set_bytes = max(self.peak_working_set_bytes or 0, now)

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
        self._count(working_set_bytes(PeakMemory._group()))
