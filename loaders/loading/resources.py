"""What several models in one process have in common: worker threads, a budget of memory, the cache.

Made at the first use, by what this process may use of the machine; `configure` says otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from loaders.backends import machine
from loaders.errors import BadSpec
from loaders.loading.cache import WeightCache, default_folder

MB = 1_000_000
SHARE = 0.25  # of the free memory, for work under way
T = TypeVar("T")


class Budget:
    """Bytes that work under way may hold, over all threads and models. Results are their owners'."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait until so many bytes are free, and hold them. What is larger than all of it waits to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: self.used == 0 or self.used + size <= self.size)
            self.used += size
        try:
            yield
        finally:
            with self._changed:
                self.used -= size
                self._changed.notify_all()


class Crew(ThreadPoolExecutor):
    """Threads whose `map` leaves nothing running: an error ends it once all that had begun is over."""

    def map(self, fn: Callable[..., T], *items: Iterable[Any], **settings: Any) -> Iterator[T]:
        futures = [self.submit(fn, *each) for each in zip(*items, strict=True)]
        try:
            return iter([future.result() for future in futures])
        finally:
            for future in futures:
                future.cancel()
            wait(futures)


class Shared:
    """Workers, budget, cache."""

    def __init__(self, workers: int, budget_bytes: int, folder: Path) -> None:
        self.workers = workers
        self.pool = Crew(workers, thread_name_prefix="weightmill")
        self.budget = Budget(budget_bytes)
        self.cache = WeightCache(folder)


_LOCK = threading.Lock()
_SHARED: list[Shared] = []


def shared() -> Shared:
    """The process's own."""
    with _LOCK:
        if not _SHARED:
            _SHARED.append(_made(None, None, None))
        return _SHARED[0]


def configure(
    *, workers: int | None = None, memory_budget_mb: float | None = None, cache_folder: Path | str | None = None
) -> Shared:
    """Set what loads from now on share; what is None is as this machine suggests. Loads under way keep what they have.

    Raises:
        BadSpec: not a positive number.
    """
    for name, value in (("workers", workers), ("memory_budget_mb", memory_budget_mb)):
        if value is not None and value <= 0:
            raise BadSpec(f"{name}: expected more than 0, found {value}")
    made = _made(workers, memory_budget_mb, cache_folder)
    with _LOCK:
        _SHARED[:] = [made]
    return made


def _made(workers: int | None, memory_budget_mb: float | None, folder: Path | str | None) -> Shared:
    budget = SHARE * machine.free_memory() if memory_budget_mb is None else memory_budget_mb * MB
    return Shared(workers or machine.usable_cpus(), int(budget), default_folder() if folder is None else Path(folder))
