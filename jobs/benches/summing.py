"""Touching every byte: a sum over a tensor that runs at the speed of memory, alone or on several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from loaders.quantization.kernels.lanes import kernel

ALONE = 4 << 20  # bytes up to which more threads cost more than they bring
WORDS = 8


@kernel
def _words(x):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(x.size):
        total += x[i]
    return total


def total(raw: np.ndarray, pool: ThreadPoolExecutor, threads: int) -> int:
    """The sum of a uint8 array's little-endian words of eight bytes, the last filled up with zeros, modulo 2^64."""
    whole = raw[: raw.size // WORDS * WORDS].view(np.uint64)
    if raw.size <= ALONE or threads == 1:
        found = int(_words(whole))
    else:
        edges = [whole.size * i // threads for i in range(threads + 1)]
        found = sum(int(each) for each in pool.map(lambda a, b: _words(whole[a:b]), edges[:-1], edges[1:]))
    rest = bytes(raw[raw.size // WORDS * WORDS :]).ljust(WORDS, b"\0")
    return (found + int.from_bytes(rest, "little")) % (1 << 64)
