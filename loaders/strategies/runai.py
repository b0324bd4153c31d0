"""`runai`: the Run:ai model streamer, an optional library that keeps many requests in flight, made for network storage.

The library gives ranges as they arrive; here they wait for their turn, a batch of `batch_mb` megabytes at a time. The
library's environment variables set threads and block size (RUNAI_STREAMER_CONCURRENCY and others).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import BadSpec, StorageError, io_errors
from loaders.faults import not_positive
from loaders.missing import needed_for
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.storage.folder import Folder
from loaders.strategies.base import PieceReader, TensorBytes, WeightLoader, cut_short, local_root
from loaders.strategies.lazy import MappedFiles
from loaders.strategies.streaming import batched

MB = 1_000_000


def streamer() -> Any:
    """Open a session of the library.

    Raises:
        BadSpec: it is not installed.
    """
    with needed_for("strategy=runai"):
        from runai_model_streamer.file_streamer import FileStreamer
    return FileStreamer()


class StreamedByRunai:
    """A `PieceReader` over the library. Each thread's ranges go through a session of its own."""

    def __init__(self, root: Path, batch: int) -> None:
        self._root = root
        self._batch = batch
        self._maps = MappedFiles(root)
        self._own = threading.local()
        self._sessions: list[Any] = []

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        session = getattr(self._own, "session", None)
        if session is None:
            # A session is a context manager, but this one lives as long as the reader: `close` ends it.
            session = self._own.session = streamer().__enter__()
            self._sessions.append(session)
        [found] = self._fetched(session, [TensorBytes(spec, start, stop)])
        return found

    def mapped(self, spec: WeightSpec, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._maps.mapped(spec, start, stop)

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        at = 0
        with streamer() as session:
            for batch in batched([piece.size for piece in pieces], self._batch):
                arrays = self._fetched(session, pieces[at : at + len(batch)])
                at += len(batch)
                while arrays:
                    yield arrays.pop(0)

    def close(self) -> None:
        for session in self._sessions:
            session.__exit__(None, None, None)

    def _fetched(self, session: Any, pieces: Sequence[TensorBytes]) -> list[np.ndarray]:
        """Read pieces in one request; those without bytes are not asked for."""
        from runai_model_streamer.file_streamer import FileChunks

        found = {index: np.empty(0, np.uint8) for index, piece in enumerate(pieces) if piece.size == 0}
        by_file: dict[str, list[int]] = {}
        for index, piece in enumerate(pieces):
            if piece.size:
                by_file.setdefault(piece.spec.file, []).append(index)
        chunks = []
        for number, (file, indices) in enumerate(by_file.items()):
            self._check(file, [pieces[i] for i in indices])
            offsets = [pieces[i].spec.offset + pieces[i].start for i in indices]
            chunks.append(FileChunks(number, os.fspath(self._root / file), offsets, [pieces[i].size for i in indices]))
        places = list(by_file.values())
        if chunks:
            try:
                session.stream_files(chunks)
                for number, index, tensor in session.get_chunks():
                    found[places[number][index]] = tensor.reshape(-1).numpy()
            except ValueError as error:  # the library raises this for every error of its C++ core
                raise StorageError(f"strategy=runai: reading {', '.join(by_file)} in {self._root}: {error}") from error
        return [found[index] for index in range(len(pieces))]

    def _check(self, file: str, pieces: Sequence[TensorBytes]) -> None:
        """Raise for a file that is too short or cannot be opened, which says more than the library's errors."""
        size = Folder(self._root).entry_of(file).size
        for piece in pieces:
            if size < piece.spec.offset + piece.spec.size:
                raise cut_short(piece.spec, size)
        with io_errors("opening", self._root / file), (self._root / file).open("rb"):
            pass


class RunaiLoader(WeightLoader):
    """The strategy `runai`. It holds `batch_mb` megabytes (1e6 bytes), or one tensor."""

    name = "runai"
    not_for_jobs = "its sessions serve one stream at a time; strategy=multithread reads ranges in parallel"

    def __init__(self, batch_mb: float = 256.0) -> None:
        if (wrong := not_positive("strategy.batch_mb", batch_mb)) is not None:
            raise BadSpec(wrong)
        self.batch_mb = batch_mb

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        streamer()  # so that a missing library is reported before any file is opened
        streamed = StreamedByRunai(local_root(files, self.name), int(self.batch_mb * MB))
        try:
            yield streamed
        finally:
            streamed.close()
