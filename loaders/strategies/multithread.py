"""`multithread`: files and ranges of them are read side by side, by as many threads as measuring shows to be best.

Whole tensors and slices are read ahead within a fixed window; those that the page cache holds are mapped. A job asks
for ranges from any of its threads: then the strategy's threads fetch what comes next into the page cache, within a
window ahead of the furthest range that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

from loaders.backends.devices import fed
from loaders.backends.machine import free_memory
from loaders.errors import BadSpec
from loaders.faults import not_positive
from loaders.specs import WeightSpec
from loaders.storage import local
from loaders.storage.base import PinnedFiles
from loaders.strategies.base import PieceReader, TensorBytes, WeightLoader, local_root
from loaders.strategies.reading.open_files import OpenFiles
from loaders.strategies.reading.page_cache import MOST_THREADS, RANGE, CacheAhead
from loaders.strategies.reading.read_ahead import read_ahead
from loaders.strategies.reading.thread_tuning import Workers

MB = 1_000_000
WINDOW = 256 * MB  # bytes read ahead: enough to keep many threads busy, and the strategy's promise about memory
# Threads that adaptive reading begins with. From one, it would take a lap longer to find the best number; more could
# already be too many for a rotating disk.
FEWEST = 2
# The threads with which fetching into the page cache begins, and the most, by the medium. They take no CPU. A disk
# wants several requests at once, a rotating one must not seek, and other machines answer late.
FETCHED_BY = {
    "memory": (1, 1), "local": (4, MOST_THREADS), "rotational": (1, 2), "network": (8, MOST_THREADS),
    "object": (8, MOST_THREADS),
}  # fmt: skip
LONG_WINDOW = 2 << 30  # bytes fetched ahead in a job at most: as many as a disk gives until its first unit begins


class ThreadedFiles(OpenFiles):
    """A `PieceReader` whose threads read ahead. `cache` fetches what ranges will be asked for, if that has begun."""

    def __init__(
        self, root: Path, specs: Sequence[WeightSpec], workers: Workers, fetchers: Workers, cache: CacheAhead | None
    ) -> None:
        super().__init__(root, readahead=0)
        self._workers = workers
        self._own = CacheAhead(self, specs, WINDOW, fetchers) if cache is None else None
        self._cache = self._own or cache

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        assert self._cache is not None
        self._cache.reached(spec, stop)
        return super().read(spec, start, stop, slot)

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        return read_ahead(self, pieces, self._workers, WINDOW)

    def close(self) -> None:
        if self._own is not None:
            self._own.stop()
        super().close()


class MultiThreadWeightLoader(WeightLoader):
    """The strategy `multithread`.

    It reads with several threads: at most `max_workers` (None: what the device and the storage suggest), and no more
    than have `min_file_size_per_worker` megabytes (1e6 bytes) each to read; a million and more are bytes, as other
    libraries have them. With `adaptive_workers` it begins with two and measures whether more are faster; without, it
    takes the most at once. It holds 256 MB ahead, or one tensor. `stats` adds up what it has loaded.
    """

    name = "multithread"

    def __init__(
        self, max_workers: int | None = None, adaptive_workers: bool = True, min_file_size_per_worker: float = 32.0
    ) -> None:
        most = None if max_workers is None else not_positive("strategy.max_workers", max_workers, whole=True)
        wrong = most or not_positive("strategy.min_file_size_per_worker", min_file_size_per_worker)
        if wrong is not None:
            raise BadSpec(wrong)
        self.max_workers = max_workers
        self.adaptive_workers = adaptive_workers
        # Nobody means a terabyte a thread.
        is_bytes = min_file_size_per_worker >= MB
        self.min_file_size_per_worker = min_file_size_per_worker / MB if is_bytes else min_file_size_per_worker
        self._cache: CacheAhead | None = None  # of all that a job reads, while it runs
        self.workers_said = ""  # how many threads read last, and the rates that led to it, for reports

    @property
    def held_bytes(self) -> int:
        return RANGE * min(self.max_workers or MOST_THREADS, MOST_THREADS)

    def _workers(self, device: str | None, root: Path, specs: Sequence[WeightSpec]) -> Workers:
        most = self.max_workers or fed(device).workers(self.name, local.medium(root))
        by_size = int(sum(spec.size for spec in specs) / (self.min_file_size_per_worker * MB))
        most = max(1, min(most, by_size))
        return Workers(min(FEWEST, most), most, adaptive=self.adaptive_workers)

    def _fetchers(self, root: Path, specs: Sequence[WeightSpec]) -> Workers:
        """Return the gate of threads that fetch into the page cache: they wait, so CPUs do not limit their number."""
        least, most = FETCHED_BY[local.medium(root)]
        by_size = int(sum(spec.size for spec in specs) / (self.min_file_size_per_worker * MB))
        most = max(1, min(self.max_workers or most, by_size))
        return Workers(min(least, most), most, adaptive=self.adaptive_workers)

    @contextmanager
    def ahead(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[None]:
        root = local_root(files, self.name)
        opened, window = OpenFiles(root), max(WINDOW, min(LONG_WINDOW, free_memory() // 4))
        self._cache = CacheAhead(opened, specs, window, self._fetchers(root, specs))
        self._cache.begin()
        try:
            yield
        finally:
            self._cache.stop()
            self._cache = None
            opened.close()

    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> AbstractContextManager[PieceReader]:
        return self.open_on(None, files, specs)

    @contextmanager
    def open_on(self, device: str | None, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        root = local_root(files, self.name)
        workers = self._workers(device, root, specs)
        cache = self._cache if self._cache is not None and self._cache.covers(specs) else None
        opened = ThreadedFiles(root, specs, workers, self._fetchers(root, specs), cache)
        try:
            yield opened
        finally:
            opened.close()
            self.workers_said = str(workers)
