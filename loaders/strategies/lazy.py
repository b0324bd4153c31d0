"""`lazy`: files are mapped; weights in the page cache are used in place, at the speed of memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loaders.errors import io_errors
from loaders.specs import WeightSpec
from loaders.strategies.base import Reader, WeightLoader, cut_short


def map_file(path: Path) -> np.ndarray:
    """A read-only map of a file, uint8; it lives as long as something refers to it."""
    with io_errors("mapping", path), path.open("rb") as file:
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


class MappedFiles:
    """Maps files at their first use. See `Reader`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._maps: dict[str, np.ndarray] = {}

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        return self.mapped(spec)[start:stop]

    def mapped(self, spec: WeightSpec) -> np.ndarray:
        found = self._maps.get(spec.file)
        if found is None:  # two threads may map one file twice, which costs nothing
            found = self._maps.setdefault(spec.file, map_file(self._root / spec.file))
        if found.size < spec.offset + spec.size:
            raise cut_short(spec, found.size)
        return found[spec.offset : spec.offset + spec.size]


class LazyLoader(WeightLoader):
    """Maps, and lets the kernel read ahead."""

    name = "lazy"

    @contextmanager
    def open(self, root: Path, specs: Sequence[WeightSpec]) -> Iterator[Reader]:
        yield MappedFiles(root)
