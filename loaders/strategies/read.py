"""`read`: large reads into reused buffers, by the thread that asks.

It is never far from the best where files are not cached, and better than a map on a network filesystem, where a map
fetches page by page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.strategies.base import PieceReader, TensorBytes, WeightLoader, local_root
from loaders.strategies.reading.buffers import Buffers
from loaders.strategies.reading.open_files import AHEAD, OpenFiles

BUFFERS = 64 << 20  # bytes of unused buffers kept for the next tensors: more saves fresh memory, and holds more of it


class ReadFiles(OpenFiles):
    """A `PieceReader` that reads a piece when it is asked for, while the kernel fetches the next."""

    def stream(self, pieces: Sequence[TensorBytes]) -> Iterator[np.ndarray]:
        buffers = Buffers(BUFFERS)
        for piece in pieces:
            out = buffers.take(piece.size)
            for at in range(0, piece.size, AHEAD):
                part = out[at : at + AHEAD]
                self.advise(piece.spec, piece.start + at, piece.start + at + len(part) + AHEAD)
                self.fill(piece.spec, piece.start + at, part)
            yield out
            del out


class ReadLoader(WeightLoader):
    """The strategy `read`: each range is read when it is asked for, while the kernel fetches the next."""

    name = "read"

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        opened = ReadFiles(local_root(files, self.name))
        try:
            for spec in specs:
                opened.descriptor(spec.file)
            yield opened
        finally:
            opened.close()
