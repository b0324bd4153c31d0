"""Plain ways of reading files without weightmill, with which strategies are compared. Each sums every byte."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jobs.benchmarks.summing import Summing, total
from loaders.strategies.lazy import map_file

CHUNK = 8 << 20  # bytes of one read, as in strategies/reading/read_ahead.py
MAPPED = "mapped files, summed in place"
Way = Callable[[], int]


def mapped(files: Sequence[Path], pool: ThreadPoolExecutor, threads: int) -> Way:
    """Sum memory maps of the files in place, a few MiB at a time, on all threads."""
    step = 4 * CHUNK

    def read() -> int:
        summing = Summing(pool, threads)
        for path in files:
            whole = map_file(path)
            for at in range(0, whole.size, step):
                summing.add(whole[at : at + step])
        return summing.total()

    return read


def preads(files: Sequence[Path], threads: int, *, direct: bool = False) -> Way:
    """Sum large reads, with one buffer per thread; thread i of n reads chunks i, i + n, i + 2n, ..."""

    def part(path: Path, first: int) -> int:
        # O_DIRECT requires memory that is aligned to pages.
        memory = mmap.mmap(-1, CHUNK)
        view = np.frombuffer(memory, np.uint8)
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        descriptor, found = os.open(path, flags), 0
        try:
            for at in range(first * CHUNK, path.stat().st_size, threads * CHUNK):
                if not direct:
                    os.posix_fadvise(descriptor, at, CHUNK, os.POSIX_FADV_WILLNEED)
                count, asked = 0, -1
                # A read may return fewer bytes than requested.
                while count < CHUNK and asked:
                    asked = os.preadv(descriptor, [view[count:].data], at + count)
                    count += asked
                    if direct and count % mmap.PAGESIZE:
                        # The end of the file; another O_DIRECT read from an unaligned offset would fail.
                        break
                found += total(view[:count])
        finally:
            os.close(descriptor)
        return found

    def read() -> int:
        with ThreadPoolExecutor(threads) as own:
            found = sum(sum(own.map(lambda first: part(path, first), range(threads))) for path in files)  # noqa: B023
        return found % (1 << 64)

    return read


def plain_ways(files: Sequence[Path], pool: ThreadPoolExecutor, threads: int) -> dict[str, Way]:
    """Return all plain ways of reading, by their names in the table."""
    ways = {MAPPED: mapped(files, pool, threads)}
    for count in sorted({1, threads}):
        ways[f"read() of 8 MiB, {count} thread{'s' if count > 1 else ''}"] = preads(files, count)
    if hasattr(os, "O_DIRECT"):
        ways[f"direct read() of 8 MiB, {threads} threads"] = preads(files, threads, direct=True)
    return ways
