"""The resources that all loads of a process share: worker threads, a memory budget, the cache on disk.

They are created at the first use, sized for what this process may use of the machine, or by `configure`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loaders.backends import machine
from loaders.backends.threads import Crew
from loaders.errors import BadSpec
from loaders.faults import not_positive
from loaders.loading.cache import WeightCache
from loaders.storage.user_cache import default_folder

MB = 1_000_000
# The share of the free memory that work in progress may hold. Results come on top of it, and need most of the rest.
SHARE = 0.25


class Budget:
    """A limit on the bytes that work in progress holds, over all threads and models. Results do not count."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until so many bytes are free, and hold them during the block.

        A request for more than the whole budget waits until nothing else is held, instead of for ever.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.used == 0 or self.used + size <= self.size)
            self.used += size
        try:
            yield
        finally:
            with self._changed:
                self.used -= size
                self._changed.notify_all()


class Shared:
    """The worker threads, the memory budget and the cache."""

    def __init__(self, workers: int, budget_bytes: int, folder: Path) -> None:
        self.workers = workers
        self.crew = Crew(workers, "weightmill")
        self.budget = Budget(budget_bytes)
        self.cache = WeightCache(folder)


_LOCK = threading.Lock()
_SHARED: list[Shared] = []


def shared() -> Shared:
    """Return the process's shared resources, created at the first call."""
    with _LOCK:
        if not _SHARED:
            _SHARED.append(_made(None, None, None))
        return _SHARED[0]


def configure(
    *, workers: int | None = None, memory_budget_mb: float | None = None, cache_folder: Path | str | None = None
) -> Shared:
    """Set the resources that later loads share; None takes the machine's default. Running loads keep theirs.

    Raises:
        BadSpec: a number is not positive.
    """
    for name, value in (("workers", workers), ("memory_budget_mb", memory_budget_mb)):
        if value is not None and (wrong := not_positive(name, value, whole=name == "workers")) is not None:
            raise BadSpec(wrong)
    made = _made(workers, memory_budget_mb, cache_folder)
    with _LOCK:
        _SHARED[:] = [made]
    return made


def _made(workers: int | None, memory_budget_mb: float | None, folder: Path | str | None) -> Shared:
    budget = SHARE * machine.free_memory() if memory_budget_mb is None else memory_budget_mb * MB
    return Shared(workers or machine.usable_cpus(), int(budget), default_folder() if folder is None else Path(folder))
