"""Touching every byte: sums that run at the speed of memory, on several threads, beside whoever hands out the bytes."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from loaders.quantization.kernels.lanes import kernel

PART = 16 << 20  # bytes up to which more threads cost more than they bring: other arrays keep them busy
WORDS = 8
AHEAD = 2  # parts for each thread that wait; their arrays are held until then


@kernel
def _words(x):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(x.size):
        total += x[i]
    return total


class Summing:
    """Sums of arrays' little-endian words of eight bytes, each array's last filled up with zeros, modulo 2^64."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self._pool = pool
        self._threads = threads
        self._sum = 0
        self._running: deque[Future[int]] = deque()

    def add(self, raw: np.ndarray) -> None:
        """Begin to sum a uint8 array; waits while there is enough to do."""
        size = raw.size // WORDS * WORDS
        self._sum += int.from_bytes(bytes(raw[size:]), "little")
        words = raw[:size].view(np.uint64)
        count = max(1, min(self._threads, -(-size // PART)))
        edges = [words.size * i // count for i in range(count + 1)]
        for start, stop in pairwise(edges):
            self._running.append(self._pool.submit(_words, words[start:stop]))
        while len(self._running) > AHEAD * self._threads:
            self._sum += int(self._running.popleft().result())

    def total(self) -> int:
        """Of all arrays so far."""
        while self._running:
            self._sum += int(self._running.popleft().result())
        return self._sum % (1 << 64)


def total(raw: np.ndarray) -> int:
    """The same of one array, on this thread."""
    size = raw.size // WORDS * WORDS
    return (int(_words(raw[:size].view(np.uint64))) + int.from_bytes(bytes(raw[size:]), "little")) % (1 << 64)
