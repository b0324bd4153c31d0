"""Sums over every byte, at the speed of memory, on threads that run concurrently with the reader of the bytes."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from loaders.quantization.kernels.lanes import kernel

PART = 16 << 20  # bytes that one thread sums; splitting smaller arrays costs more than it gains
WORDS = 8  # bytes of a word
AHEAD = 2  # parts per thread that may wait, whose arrays stay in memory until they are summed


@kernel
def _words(x):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(x.size):
        total += x[i]
    return total


class Summing:
    """The sum, modulo 2^64, of arrays' little-endian 8-byte words; an array's last word is padded with zeros."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self._pool = pool
        self._threads = threads
        self._sum = 0
        self._running: deque[Future[int]] = deque()

    def add(self, raw: np.ndarray) -> None:
        """Start summing a uint8 array; waits while too many parts are queued."""
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
        """Wait for all parts and return the sum of all arrays so far."""
        while self._running:
            self._sum += int(self._running.popleft().result())
        return self._sum % (1 << 64)


def total(raw: np.ndarray) -> int:
    """Return the same sum for one array, computed on this thread."""
    size = raw.size // WORDS * WORDS
    return (int(_words(raw[:size].view(np.uint64))) + int.from_bytes(bytes(raw[size:]), "little")) % (1 << 64)
