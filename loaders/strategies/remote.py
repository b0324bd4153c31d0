"""`remote`: tensors of a store that is not local are fetched whole into scratch files, one tensor ahead of their use.

Every stored byte is fetched once, however often a scheme reads it: passes, views of stacked experts and measuring read
a memory map of the scratch file. The scratch files of a reader are at most the tensors that it is opened for, which in
a job are those of a unit.
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

# Bytes of one request. At 100 ms of latency and 100 MB/s per connection, 8 MiB spend as long on data as on waiting;
# larger ones leave fewer to run side by side, and each is held in memory.
PART = 8 << 20
# Requests in flight: object stores limit a connection's rate, and memory is AT_ONCE * PART.
AT_ONCE = 4
# Tensors fetched beyond the one asked for: enough to overlap fetching with encoding.
AHEAD = 1


class RemoteFiles:
    """A `PieceReader` that fetches a tensor at its first use, and the next one in the background."""

    def __init__(self, files: PinnedFiles, specs: Sequence[WeightSpec], scratch: Path) -> None:
        self._files = files
        self._scratch = scratch
        self._order = list(dict.fromkeys((spec.file, spec.offset, spec.size) for spec in specs))
        self._places = {place: index for index, place in enumerate(self._order)}
        self._fetched: dict[int, Future[np.ndarray]] = {}
        self._lock = threading.Lock()
        # Two pools, since a fetcher waits for its requests: in one pool, waiting fetchers could take all the threads
        # that those requests need.
        self._fetchers = ThreadPoolExecutor(1 + AHEAD, thread_name_prefix="fetch")
        self._requests = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="range")

    def close(self) -> None:
        """Stop fetching. The owner of the scratch folder removes the files."""
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
    """The strategy `remote`, which reads from every kind of store, local folders included."""

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
