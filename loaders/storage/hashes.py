"""xxh3 checksums of files and ranges. They detect accidental damage; they are no protection against an attacker."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from loaders.errors import io_errors
from loaders.storage.base import Entry, Store

# Bytes read at once: enough to hide the cost of a call, and little enough for every thread to have such a buffer.
BLOCK = 4 << 20


def digest(data: bytes | np.ndarray) -> str:
    """Return the xxh3-64 of bytes or of a contiguous array, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data if isinstance(data, bytes) else data.data)


# JSON with a hash before it, so that a flipped bit anywhere is noticed: a record, a cache entry, the request of a job.
SEALED = re.compile(rb'\{"xxh3":"([0-9a-f]{16})","content":(.*)\}', re.DOTALL)


def sealed(content: bytes) -> bytes:
    """Return JSON with its hash, as JSON."""
    return b'{"xxh3":"%s","content":%s}' % (digest(content).encode(), content)


def opened(raw: bytes) -> bytes | None:
    """Return the JSON that was sealed; None if it is damaged, or was never sealed."""
    found = SEALED.fullmatch(raw)
    return found[2] if found is not None and digest(found[2]) == found[1].decode() else None


def unsealed(raw: bytes) -> Any:
    """Return the values of JSON that was sealed; None if it is damaged, or was never sealed."""
    content = opened(raw)
    return None if content is None else json.loads(content)


def text_digest(text: str) -> str:
    """Return the xxh3-128 of a text, as 32 hex digits. It names plans, jobs and sources."""
    return digest_of([text])


def digest_of(texts: Iterable[str]) -> str:
    """Return the digest of one text that comes in parts, so that it need not be in memory as a whole."""
    hasher = xxhash.xxh3_128()
    for text in texts:
        hasher.update(text.encode())
    return hasher.hexdigest()


def hash_stored(store: Store, entry: Entry, start: int = 0, size: int | None = None) -> str:
    """Return the xxh3-128 of `size` bytes (None: all that remain) of a stored file from byte `start`, as 32 hex digits.

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
    """Return the xxh3-128 of `size` bytes (None: all that remain) of a local file from byte `start`, as 32 hex digits.

    `on_bytes` is called with the size of each block read, for progress.

    Raises:
        StorageError: the file cannot be read.
    """
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
