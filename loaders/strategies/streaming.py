"""`streaming`: weights come in batches within a budget of memory, and the next ones are fetched while one is used.

The budget holds the batches that are being fetched and the one in use; what the caller keeps is beyond it. Headers tell
which batch comes next, so that fetching ahead never guesses wrong. What the page cache holds is mapped. A tensor larger
than half the budget comes in slices that fit (iterate_slices), or, if it is asked for as a whole, as a map of its file,
whose pages the kernel can take back. Half, because a loop still holds one tensor while it asks for the next.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loaders.backends.devices import fed
from loaders.checkpoints.file_lists import Given, open_weights
from loaders.errors import BadSpec
from loaders.faults import not_positive
from loaders.specs import WeightSpec
from loaders.storage import local
from loaders.storage.base import PinnedFiles
from loaders.strategies.base import PieceReader, TensorBytes, WeightLoader, local_root
from loaders.strategies.lazy import map_privately
from loaders.strategies.reading.open_files import OpenFiles
from loaders.strategies.reading.page_cache import MOST_THREADS, RANGE, CacheAhead
from loaders.strategies.reading.read_ahead import read_ahead
from loaders.strategies.reading.thread_tuning import Workers

MB = 1_000_000
MOST_SLICE = 32 << 20  # bytes of a slice at most, however large the budget: enough for a disk's full rate
LEAST_MB = 16  # a smaller budget would not hold two of the ranges that threads read


class StreamedFiles(OpenFiles):
    """A `PieceReader` that fetches ahead within a budget of bytes."""

    def __init__(self, root: Path, specs: Sequence[WeightSpec], budget: int, prefetch: int, workers: Workers) -> None:
        super().__init__(root)
        self._budget = budget
        self._prefetch = prefetch
        self._workers = workers
        window = max(0, budget - RANGE * min(MOST_THREADS, workers.most))  # the threads' own buffers are in the budget
        self._cache = CacheAhead(self, specs, window, workers) if prefetch else None

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        if self._cache is not None:
            self._cache.reached(spec, stop)
        return super().read(spec, start, stop, slot)

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        batches = batched([piece.size for piece in pieces], self._budget // (self._prefetch + 1))
        number = [batch for batch, count in enumerate(map(len, batches)) for _ in range(count)]
        # Two tensors are held at a time: the one in use, and the one being read.
        largest = self._budget // 2
        fitting = [piece for piece in pieces if piece.size <= largest]
        indices = [index for index, piece in enumerate(pieces) if piece.size <= largest]

        def may_begin(index: int, current: int) -> bool:
            return number[indices[index]] <= number[indices[current]] + self._prefetch

        arrays = read_ahead(self, fitting, self._workers, self._budget, may_begin)
        try:
            for piece in pieces:
                if piece.size > largest:
                    yield self._map(piece)
                else:
                    yield next(arrays)
        finally:
            arrays.close()  # type: ignore[attr-defined]

    def _map(self, piece: TensorBytes) -> np.ndarray:
        spec = piece.spec
        self.mapped(spec)  # which checks that the file is long enough
        return map_privately(self._root / spec.file, spec.offset + piece.start, spec.offset + piece.stop)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.stop()
        super().close()


class StreamingWeightLoader(WeightLoader):
    """The strategy `streaming`.

    It loads within `memory_budget_mb` megabytes (1e6 bytes), `prefetch_count` batches ahead of the one in use.
    `priority_weights` are tensors that come first, in that order: names, parts of names, or patterns with * and ?.
    """

    name = "streaming"

    def __init__(
        self,
        memory_budget_mb: float = 512.0,
        prefetch_count: int = 2,
        priority_weights: Iterable[str] | str | None = (),
    ) -> None:
        if (wrong := not_positive("strategy.memory_budget_mb", memory_budget_mb, least=LEAST_MB)) is not None:
            raise BadSpec(wrong)
        if isinstance(prefetch_count, bool) or not isinstance(prefetch_count, int):
            raise BadSpec(f"strategy.prefetch_count: expected a whole number, found {prefetch_count!r}")
        if prefetch_count < 0:
            raise BadSpec(f"strategy.prefetch_count: expected 0 or more, found {prefetch_count}")
        self.memory_budget_mb = memory_budget_mb
        self.prefetch_count = prefetch_count
        one = isinstance(priority_weights, str)
        self.priority_weights = (str(priority_weights),) if one else tuple(priority_weights or ())

    @property
    def budget(self) -> int:
        """The budget in bytes."""
        return int(self.memory_budget_mb * MB)

    @property
    def slice_bytes(self) -> int:
        return min(MOST_SLICE, self.budget // (self.prefetch_count + 2))

    @property
    def held_bytes(self) -> int:
        return min(self.budget, RANGE * MOST_THREADS) if self.prefetch_count else 0

    def order(self, specs: Sequence[WeightSpec]) -> list[WeightSpec]:
        return sorted(specs, key=lambda spec: self.priority(spec.name))

    def priority(self, name: str) -> int:
        """Return the place of the first of `priority_weights` that names the tensor; others come after all of them."""
        found = (index for index, wanted in enumerate(self.priority_weights) if _names(wanted, name))
        return next(found, len(self.priority_weights))

    def iterate_batches(
        self, file_paths: Given, device: Any = None, *, names: Iterable[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield weights a batch at a time, each within the budget divided by `prefetch_count` + 1, or one tensor.

        Raises:
            As iterate_weights.
        """
        checkpoint, wanted = open_weights(file_paths), None if names is None else set(names)
        specs = self.get_weight_specs(checkpoint)
        sizes = [spec.size for spec in specs.values() if wanted is None or spec.name in wanted]
        weights = self.iterate_weights(checkpoint, device, names=wanted)
        for batch in batched(sizes, self.budget // (self.prefetch_count + 1)):
            yield dict(next(weights) for _ in batch)
        for _ in weights:  # a generator's statistics are added when it ends
            raise AssertionError("more weights than specs")

    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> AbstractContextManager[PieceReader]:
        return self.open_on(None, files, specs)

    @contextmanager
    def open_on(self, device: str | None, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        root = local_root(files, self.name)
        workers = Workers(1, fed(device).workers(self.name, local.medium(root)))
        streamed = StreamedFiles(root, specs, self.budget, self.prefetch_count, workers)
        try:
            yield streamed
        finally:
            streamed.close()


def _names(wanted: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, wanted) if set("*?[") & set(wanted) else wanted in name


def batched(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut sizes into runs that sum to at most `limit`, or that are one size."""
    batches: list[list[int]] = []
    total = 0
    for size in sizes:
        if not batches or total + size > limit:
            batches.append([])
            total = 0
        batches[-1].append(size)
        total += size
    return batches
