"""`lazy`: files are mapped; weights in the page cache are used in place, at the speed of memory."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loaders.errors import io_errors
from loaders.specs import WeightSpec
from loaders.storage import local
from loaders.storage.base import PinnedFiles
from loaders.storage.read_limit import before_reading, is_limited
from loaders.strategies.base import PieceReader, TensorBytes, WeightLoader, cut_short, local_root
from loaders.strategies.reading.cut_maps import name_map

# MAP_NORESERVE, which Python's mmap does not name: without it, Linux counts all of a private writable map as memory
# that may be needed, and may refuse to map a file larger than that.
NO_RESERVE = 0x4000 if sys.platform.startswith("linux") else 0


def map_file(path: Path, *, private: bool = False) -> np.ndarray:
    """Map a file as a uint8 array, which lives as long as something refers to it.

    It cannot be written to, unless it is private: then writes stay in this process and do not reach the file.
    """
    if private:
        with io_errors("mapping", path):
            size = path.stat().st_size
        return map_privately(path, 0, size)
    with io_errors("mapping", path), path.open("rb") as file:
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)
        found = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    name_map(found.ctypes.data, found.nbytes, path)
    return found


def map_privately(path: Path, start: int, stop: int) -> np.ndarray:
    """Map bytes [start, stop) of a file privately: the array can be written to, but the file does not change."""
    with io_errors("mapping", path), path.open("rb") as file:
        # A map must begin at a page.
        first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        if stop == start:
            return np.empty(0, np.uint8)
        made = mmap.mmap(
            file.fileno(),
            stop - first,
            flags=mmap.MAP_PRIVATE | NO_RESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=first,
        )
        found = np.frombuffer(made, np.uint8)[start - first :]
    name_map(found.ctypes.data, found.nbytes, path)
    return found


class MappedFiles:
    """A `PieceReader` that maps files at their first use."""

    def __init__(self, root: Path, *, private: bool = False) -> None:
        self._root = root
        self._private = private
        self._maps: dict[str, np.ndarray] = {}

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        return self.mapped(spec, start, stop)

    def mapped(self, spec: WeightSpec, start: int = 0, stop: int | None = None) -> np.ndarray:
        found = self._maps.get(spec.file)
        if found is None:  # two threads may map one file twice, which costs nothing
            found = self._maps.setdefault(spec.file, map_file(self._root / spec.file, private=self._private))
        if found.size < spec.offset + spec.size:
            raise cut_short(spec, found.size)
        if is_limited():
            self._wait_for(spec, start, spec.size if stop is None else stop)
        return found[spec.offset : spec.offset + spec.size][start:stop]

    def _wait_for(self, spec: WeightSpec, start: int, stop: int) -> None:
        """Wait until a range may be read; what the page cache holds is not read."""
        path = self._root / spec.file
        with io_errors("reading", path), path.open("rb") as file:
            share = local.cached_part(file.fileno(), spec.offset + start, spec.offset + stop)
        if share != 1:
            before_reading(stop - start)

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        for piece in pieces:
            yield self.read(piece.spec, piece.start, piece.stop)


class LazyLoader(WeightLoader):
    """The strategy `lazy`: files are mapped, and the kernel reads ahead.

    A file that is cut short while it is mapped ends the process (SIGBUS), which no handler of Python's can catch: for
    files that others may write to, `read` is the strategy. Torch tensors lie in private maps, so that writing to one
    copies the page and leaves the file alone.
    """

    name = "lazy"

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        yield MappedFiles(local_root(files, self.name))

    @contextmanager
    def open_on(self, device: str | None, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        yield MappedFiles(local_root(files, self.name), private=device is not None)
