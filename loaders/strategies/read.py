"""`read`: large reads into buffers that are used again. Never far from the best where files are not cached, and the
one to take on a network filesystem, where a map fetches page by page.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loaders.errors import io_errors
from loaders.scratch import Scratch
from loaders.specs import WeightSpec
from loaders.strategies.base import Reader, WeightLoader, cut_short
from loaders.strategies.lazy import MappedFiles

AHEAD = 16 << 20  # bytes the kernel is asked to fetch beyond a range


class ReadFiles:
    """Open descriptors, and each thread's buffers. See `Reader`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._descriptors: dict[str, int] = {}
        self._scratch = Scratch()
        self._maps = MappedFiles(root)

    def open_file(self, file: str) -> None:
        if file not in self._descriptors:
            with io_errors("opening", self._root / file):
                self._descriptors[file] = os.open(self._root / file, os.O_RDONLY)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        descriptor = self._descriptors[spec.file]
        out = self._scratch.array(f"read {slot}", stop - start, np.uint8)
        at, left = spec.offset + start, out.data
        with io_errors("reading", self._root / spec.file):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, spec.offset + stop, AHEAD, os.POSIX_FADV_WILLNEED)
            while left:
                count = os.preadv(descriptor, [left], at)
                if count == 0:
                    raise cut_short(spec, at)
                at, left = at + count, left[count:]
        return out

    def mapped(self, spec: WeightSpec) -> np.ndarray:
        return self._maps.mapped(spec)


class ReadLoader(WeightLoader):
    """Reads each range when it is asked for, the kernel one range ahead."""

    name = "read"

    @contextmanager
    def open(self, root: Path, specs: Sequence[WeightSpec]) -> Iterator[Reader]:
        files = ReadFiles(root)
        try:
            for spec in specs:
                files.open_file(spec.file)
            yield files
        finally:
            files.close()
