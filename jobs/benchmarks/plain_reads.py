"""Plain ways of reading files, without weightmill: what strategies are measured against. Each sums every byte."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jobs.benchmarks.summing import Summing, total
from loaders.strategies.lazy import map_file

CHUNK = 8 << 20
MAPPED = "mapped files, summed in place"
Way = Callable[[], int]


def mapped(files: Sequence[Path], pool: ThreadPoolExecutor, threads: int) -> Way:
    """The files' maps, a few MiB at a time, by all threads."""
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
    """Large reads into a buffer a thread, each thread every so-manieth chunk."""

    def part(path: Path, first: int) -> int:
        memory = mmap.mmap(-1, CHUNK)  # aligned, as direct reads want it
        view = np.frombuffer(memory, np.uint8)
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        descriptor, found = os.open(path, flags), 0
        try:
            for at in range(first * CHUNK, path.stat().st_size, threads * CHUNK):
                if not direct:
                    os.posix_fadvise(descriptor, at, CHUNK, os.POSIX_FADV_WILLNEED)
                count, asked = 0, -1
                while count < CHUNK and asked:  # a read may give less than it was asked for
                    asked = os.preadv(descriptor, [view[count:].data], at + count)
                    count += asked
                    if direct and count % mmap.PAGESIZE:
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
    """All of them, by what they are called in the table."""
    ways = {MAPPED: mapped(files, pool, threads)}
    for count in sorted({1, threads}):
        ways[f"read() of 8 MiB, {count} thread{'s' if count > 1 else ''}"] = preads(files, count)
    if hasattr(os, "O_DIRECT"):
        ways[f"direct read() of 8 MiB, {threads} threads"] = preads(files, threads, direct=True)
    return ways
