"""`eager`: every tensor is read into memory of its own before the first is handed out, by all threads that help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from loaders.backends.devices import backend
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec
from loaders.specs import WeightSpec
from loaders.storage import local
from loaders.storage.base import PinnedFiles
from loaders.strategies.base import PieceReader, TensorBytes, WeightLoader, local_root
from loaders.strategies.lazy import LazyLoader, MappedFiles
from loaders.strategies.reading.buffers import fresh
from loaders.strategies.reading.open_files import OpenFiles
from loaders.strategies.reading.read_ahead import read_all


class HeldTensors:
    """A `PieceReader` of whole tensors in memory."""

    def __init__(self, held: dict[str, np.ndarray], maps: MappedFiles) -> None:
        self._held = held
        self._maps = maps

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        return self._held[spec.name][start:stop]

    def mapped(self, spec: WeightSpec, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._held[spec.name][start:stop]

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        """Yield the pieces; a tensor is released with its last one."""
        for piece in pieces:
            found = self._held[piece.spec.name]
            if piece.stop == piece.spec.size:
                del self._held[piece.spec.name]
            yield found[piece.start : piece.stop]
            del found


class EagerLoader(WeightLoader):
    """The strategy `eager`, whose reader holds everything that it is opened for."""

    name = "eager"
    not_for_jobs = "it holds all tensors of a unit of work at once; strategy=read reads the same bytes in a few MiB"

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        root = local_root(files, self.name)
        held = {spec.name: fresh(spec.size) for spec in specs}
        opened = OpenFiles(root)
        try:
            threads = backend("cpu").workers(self.name, local.medium(root))
            read_all(opened, [(spec, held[spec.name]) for spec in specs], threads)
        finally:
            opened.close()
        yield HeldTensors(held, MappedFiles(root))


class SafetensorsLoader(WeightLoader):
    """A loader with safetensors' choice: "lazy", mapped, or "eager", read into memory. Other containers load likewise.

    `lazy` says the same as a truth value.
    """

    name = "lazy"

    def __init__(self, strategy: str = "lazy", *, lazy: bool | None = None) -> None:
        chosen = strategy if lazy is None else "lazy" if lazy else "eager"
        ways: dict[str, type[WeightLoader]] = {way.name: way for way in (LazyLoader, EagerLoader)}
        if chosen not in ways:
            raise BadSpec(f"strategy: expected lazy or eager, found {chosen!r}; loader({chosen!r}) makes any other")
        self.strategy = chosen
        self._by = ways[chosen]()
        self.name = self._by.name  # type: ignore[misc]
        self.not_for_jobs = self._by.not_for_jobs  # type: ignore[misc]

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        with self._by.open(files, specs) as reader:
            yield reader

    def _tensors(self, checkpoint: Checkpoint, specs: Sequence[WeightSpec], device: str | None) -> Any:
        return self._by._tensors(checkpoint, specs, device)
