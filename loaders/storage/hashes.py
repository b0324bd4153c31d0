"""Checksums: xxh3 of files and ranges. They find accidents, not attackers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from loaders.errors import io_errors
from loaders.storage.base import Entry, Store

BLOCK = 4 << 20


def digest(data: bytes | np.ndarray) -> str:
    """xxh3-64 of bytes or of a contiguous array, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data if isinstance(data, bytes) else data.data)


def text_digest(text: str) -> str:
    """xxh3-128 of a text, 32 hex digits: names a plan, a job, a source."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def hash_stored(store: Store, entry: Entry, start: int = 0, size: int | None = None) -> str:
    """xxh3-128 of a file of a store from byte `start` on (of `size` bytes, or to its end), 32 hex digits.

    Raises:
        As `Store.read`.
    """
    hasher, stop = xxhash.xxh3_128(), entry.size if size is None else start + size
    for at in range(start, stop, BLOCK):
        hasher.update(store.read(entry, at, min(at + BLOCK, stop)))
    return hasher.hexdigest()


def hash_file(
    path: str | os.PathLike[str],
    on_bytes: Callable[[int], None] = lambda count: None,
    start: int = 0,
    size: int | None = None,
) -> str:
    """xxh3-128 of a file from byte `start` on (of `size` bytes), 32 hex digits, through one reused buffer."""
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(BLOCK))
    left = size
    with io_errors("reading", path), Path(path).open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer[: BLOCK if left is None else min(BLOCK, left)]):
            hasher.update(buffer[:count])
            on_bytes(count)
            left = None if left is None else left - count
    return hasher.hexdigest()
