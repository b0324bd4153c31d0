"""`remote`: tensors of a store that has no paths here are fetched whole into scratch files, the next one ahead.

Every stored byte leaves its store once, however often a scheme reads it: passes, views of stacked experts and measuring
map the scratch file. Scratch is bounded by what a reader is opened for: a unit of work.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loaders.errors import io_errors
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.strategies.base import PieceReader, TensorBytes, WeightLoader
from loaders.strategies.lazy import map_privately

PART = 8 << 20  # bytes of one request: large enough that its latency does not count, small enough to run several
AT_ONCE = 4  # requests under way for a tensor
AHEAD = 1  # tensors that are fetched beyond the one that is asked for


class RemoteFiles:
    """Tensors fetched at their first use, and those after them ahead of it; see `PieceReader`."""

    def __init__(self, files: PinnedFiles, specs: Sequence[WeightSpec], scratch: Path) -> None:
        self._files = files
        self._scratch = scratch
        self._order = list(dict.fromkeys((spec.file, spec.offset, spec.size) for spec in specs))
        self._places = {place: index for index, place in enumerate(self._order)}
        self._fetched: dict[int, Future[np.ndarray]] = {}
        self._lock = threading.Lock()
        self._fetchers = ThreadPoolExecutor(1 + AHEAD, thread_name_prefix="fetch")
        self._requests = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="range")

    def close(self) -> None:
        """Stop fetching. Scratch files are removed by whoever made their folder."""
        for pool in (self._fetchers, self._requests):
            pool.shutdown(wait=True, cancel_futures=True)

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        return self.mapped(spec)[start:stop]

    def mapped(self, spec: WeightSpec) -> np.ndarray:
        index = self._index(spec)
        with self._lock:
            for each in range(index, min(index + 1 + AHEAD, len(self._order))):
                if each not in self._fetched:
                    self._fetched[each] = self._fetchers.submit(self._fetch, each)
            wanted = self._fetched[index]
        return wanted.result()

    def _index(self, spec: WeightSpec) -> int:
        place = (spec.file, spec.offset, spec.size)
        with self._lock:
            if place not in self._places:
                self._places[place] = len(self._order)
                self._order.append(place)
            return self._places[place]

    def _fetch(self, index: int) -> np.ndarray:
        file, offset, size = self._order[index]
        path = self._scratch / f"{index}"
        ranges = [(offset + at, offset + min(at + PART, size)) for at in range(0, size, PART)]
        with io_errors("writing", path), path.open("xb") as made:
            os.ftruncate(made.fileno(), size)

            def fetch(start: int, stop: int) -> None:
                data = self._files.read(file, start, stop)
                with io_errors("writing", path):
                    at = start - offset
                    while data:
                        count = os.pwrite(made.fileno(), data, at)
                        at, data = at + count, data[count:]

            for done in [self._requests.submit(fetch, *each) for each in ranges]:
                done.result()
        return map_privately(path, 0, size)

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        for piece in pieces:
            yield self.read(piece.spec, piece.start, piece.stop)


class RemoteLoader(WeightLoader):
    """The strategy `remote`, which serves every store, folders too."""

    name = "remote"
    is_local = False

    @property
    def held_bytes(self) -> int:
        return AT_ONCE * PART

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        with tempfile.TemporaryDirectory(prefix="weightmill-") as scratch:
            fetched = RemoteFiles(files, specs, Path(scratch))
            try:
                yield fetched
            finally:
                fetched.close()
