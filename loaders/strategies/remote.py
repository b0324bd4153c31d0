"""`remote`: what lies in a store that is not local is fetched ahead of its use, by requests side by side.

Every stored byte of the uses that were announced is fetched once, however often a scheme reads it: passes, views of
stacked experts and measuring. Bytes that were not announced are fetched when they are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from loaders.errors import BadSpec
from loaders.faults import not_positive
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.storage.read_limit import before_reading
from loaders.strategies.base import PieceReader, TensorBytes, Use, WeightLoader
from loaders.strategies.reading.announced import Ahead
from loaders.strategies.reading.buffers import Buffers
from loaders.strategies.reading.fetching import Fetcher, fetcher
from loaders.strategies.reading.segments import SEGMENT

MB = 1_000_000
BUDGET_MB = 1024.0
LEAST_MB = 64  # a smaller budget has no room for the requests of several threads
BUFFERS = 64 << 20  # bytes of unused buffers kept for the next tensors that are given to a caller


class RemoteFiles:
    """A `PieceReader` that fetches what was announced ahead, and anything else when it is asked for."""

    def __init__(self, files: PinnedFiles, shared: Fetcher) -> None:
        self._files = files
        self._ahead = Ahead(files, shared)

    def close(self) -> None:
        self._ahead.close()

    def expect(self, uses: Sequence[Use], stop: threading.Event | None = None) -> None:
        self._ahead.expect(uses, stop)

    def using(self, use: Use) -> AbstractContextManager[None]:
        return self._ahead.using(use)

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        return self._read(spec, start, stop, slot)

    def mapped(self, spec: WeightSpec, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._read(spec, start, spec.size if stop is None else stop, None)

    def _read(self, spec: WeightSpec, start: int, stop: int, slot: int | None) -> np.ndarray:
        first, last = spec.offset + start, spec.offset + stop
        found = self._ahead.read(spec.file, first, last, slot)
        if found is not None:
            return found
        out = np.empty(last - first, np.uint8)
        for at in range(first, last, SEGMENT):
            before_reading(min(SEGMENT, last - at))
            data = self._files.read(spec.file, at, min(at + SEGMENT, last))
            out[at - first : at - first + len(data)] = np.frombuffer(data, np.uint8)
        return out

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        buffers = Buffers(BUFFERS)
        uses = [Use((piece,), is_once=True) for piece in pieces]
        self.expect(uses)
        for piece, use in zip(pieces, uses, strict=True):
            out = buffers.take(piece.size)
            with self.using(use):
                for at in range(0, piece.size, SEGMENT):
                    part = out[at : at + SEGMENT]
                    part[:] = self.read(piece.spec, piece.start + at, piece.start + at + len(part))
            yield out
            del out


class RemoteLoader(WeightLoader):
    """The strategy `remote`, which reads from every kind of store, local folders included.

    What it holds is at most `memory_budget_mb` megabytes (1e6 bytes), for all that a process reads with that budget.
    """

    name = "remote"
    is_local = False

    def __init__(self, memory_budget_mb: float = BUDGET_MB) -> None:
        if (wrong := not_positive("strategy.memory_budget_mb", memory_budget_mb, least=LEAST_MB)) is not None:
            raise BadSpec(wrong)
        self.memory_budget_mb = memory_budget_mb

    @property
    def held_bytes(self) -> int:
        return int(self.memory_budget_mb * MB)

    def scratch_bytes(self, uses: Iterable[Use]) -> int:
        most = fetcher(self.held_bytes).most_kept
        return max((use.size for use in uses if not use.is_once and use.size > most), default=0)

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        opened = RemoteFiles(files, fetcher(self.held_bytes))
        try:
            yield opened
        finally:
            opened.close()
