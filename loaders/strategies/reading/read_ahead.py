"""Read-ahead: threads fill buffers with the pieces that come next, within a budget of bytes.

Pieces that the page cache holds are mapped instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from loaders.specs import WeightSpec
from loaders.strategies.base import TensorBytes
from loaders.strategies.reading.buffers import Buffers
from loaders.strategies.reading.open_files import OpenFiles
from loaders.strategies.reading.thread_tuning import Workers

RANGE = 8 << 20  # bytes of one read; smaller ones are slow on cold disks, larger ones leave threads idle at the end


@dataclass(slots=True)
class _Coming:
    """A piece that is being read."""

    memory: np.ndarray
    size: int
    reads: list[Future[None]]


def read_ahead(
    files: OpenFiles,
    pieces: Sequence[TensorBytes],
    workers: Workers,
    budget: int,
    may_begin: Callable[[int, int], bool] = lambda index, current: True,
) -> Iterator[np.ndarray]:
    """Yield the bytes of each piece, in order and writable, while threads read the next ones.

    The pieces that are being read and the one handed out last stay within `budget` bytes, or are two pieces.
    may_begin(index, current) tells whether piece `index` may be begun while `current` is the one asked for.
    """
    buffers, coming, begun = Buffers(budget), deque[_Coming](), 0
    pool = ThreadPoolExecutor(workers.most, thread_name_prefix="read-ahead")

    def fill(piece: TensorBytes, at: int, part: np.ndarray) -> None:
        with workers.reading(part.size):
            files.fill(piece.spec, piece.start + at, part)

    def begin(piece: TensorBytes, room: int) -> None:
        cached = files.in_place(piece.spec, piece.start, piece.stop)
        if cached is not None:
            coming.append(_Coming(cached, piece.size, []))
            return
        memory = buffers.take(piece.size, room=room)
        files.advise(piece.spec, piece.start, piece.stop)
        reads = [pool.submit(fill, piece, at, memory[at : at + RANGE]) for at in range(0, piece.size, RANGE)]
        coming.append(_Coming(memory, piece.size, reads))

    try:
        # Bytes held, and those of them in the piece handed out last: a loop drops that only after it asked for the
        # next.
        held = last = 0
        for current in range(len(pieces)):
            while begun < len(pieces):
                size = pieces[begun].size
                if coming and (held + size > budget or not may_begin(begun, current)):
                    break
                begin(pieces[begun], max(0, budget - held - size))
                held += size
                begun += 1
            ready = coming.popleft()
            for read in ready.reads:
                read.result()
            memory = ready.memory
            held, last = held - last, ready.size
            del ready
            yield memory
            del memory
    finally:
        for each in coming:
            for read in each.reads:
                read.cancel()
        wait([read for each in coming for read in each.reads])  # they write to memory that is about to be freed
        pool.shutdown(wait=True)


def read_all(files: OpenFiles, wanted: Sequence[tuple[WeightSpec, np.ndarray]], threads: int) -> None:
    """Fill an array (uint8) for each tensor with all of its bytes.

    Raises:
        BadCheckpoint, StorageError: as `OpenFiles.fill`.
    """

    def fill(spec: WeightSpec, at: int, part: np.ndarray) -> None:
        files.advise(spec, at, at + part.size + files.readahead)
        files.fill(spec, at, part)

    ranges = [(spec, at, memory[at : at + RANGE]) for spec, memory in wanted for at in range(0, spec.size, RANGE)]
    with ThreadPoolExecutor(threads, thread_name_prefix="read-all") as pool:
        list(pool.map(fill, *zip(*ranges, strict=True)))
