"""Files of servers that send no ranges: fetched whole into the cache folder, and read there.

A file of the cache is the bytes as they were fetched, then the xxh3-128 of each block of them, so that a range can be
checked when it is read; what is damaged is fetched again. Without a cache they are refused: each range would move the
whole file once more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import xxhash

from loaders.errors import BadSpec, StorageError, io_errors
from loaders.storage.atomic import file_lock
from loaders.storage.base import Entry
from loaders.storage.objects.client import ObjectClient
from loaders.storage.patience import Passing
from loaders.storage.range_cache import SUM, RangeCache, cache_of

BLOCK = 1 << 20  # bytes that have a sum behind the file's own; a range is read with the rest of its first and last


class WholeFiles:
    """The files of one server in the cache folder."""

    def __init__(self, client: ObjectClient) -> None:
        self._client = client

    def cache(self, key: str) -> RangeCache:
        """Return the cache that whole files are kept in.

        Raises:
            BadSpec: there is none.
        """
        cache = cache_of(self._client.settings)
        if cache is None:
            raise BadSpec(
                f"{self._client.what('reading', key)}: the server sends no ranges, so each tensor would move the whole"
                " file; give store.cache=FOLDER, where it is kept, or fetch the model into a folder"
            )
        return cache

    def read(self, key: str, entry: Entry, start: int, stop: int) -> memoryview:
        """Read a range of a file, which is fetched first if the cache does not have this version.

        Raises:
            BadSpec: there is no cache folder.
            StorageError: it cannot be fetched, or is not of the entry's size.
        """
        cache = self.cache(key)
        folder = cache.whole
        name = hashlib.sha256(f"{self._client.what('', key)}\0{entry.tag}\0{entry.size}".encode()).hexdigest()
        path = folder / name
        with io_errors("making", folder):
            folder.mkdir(parents=True, exist_ok=True)
        # What is damaged counts as missing.
        if (data := _read(path, entry.size, start, stop)) is None:
            with file_lock(path):
                if (data := _read(path, entry.size, start, stop)) is None:
                    cache.make_room(entry.size)
                    self._fetch(key, entry, path)
                    data = _read(path, entry.size, start, stop)
        if data is None:
            raise StorageError(
                f"reading {path}: it has gone, or is not what was written; give store.cache_gb room for it, or another"
                " store.cache"
            )
        return data

    def _fetch(self, key: str, entry: Entry, path: Path) -> None:
        part = path.with_name(f"{path.name}.part")
        what = self._client.what("fetching", key)
        try:
            self._client.patient(what, lambda: self._copy(key, entry, part))
            with io_errors("keeping", path):
                part.replace(path)
        finally:
            # It was moved away, or is of no use.
            with suppress(FileNotFoundError):
                part.unlink()

    def _copy(self, key: str, entry: Entry, part: Path) -> None:
        found, body, _ = self._client.get_whole(key)
        if (found.size, found.tag) != (entry.size, entry.tag):
            raise StorageError(f"{entry.name}: it changed while it was read; load it again when nobody writes to it")
        with io_errors("writing", part), part.open("wb") as file:
            count, sums = 0, _Sums()
            for piece in self._counted(body):
                count += file.write(piece)
                sums.add(piece)
            file.write(sums.all())
            file.flush()
            os.fsync(file.fileno())
        if count != entry.size:
            raise Passing(f"the body had {count} bytes, expected {entry.size}")

    def _counted(self, body: Iterator[memoryview]) -> Iterator[memoryview]:
        for piece in body:
            self._client.traffic.moved(fetched=len(piece))
            yield piece


class _Sums:
    """The xxh3-128 of each BLOCK bytes of a file, which comes in pieces."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._hasher, self._count = xxhash.xxh3_128(), 0

    def add(self, piece: memoryview) -> None:
        while len(piece):
            part, piece = piece[: BLOCK - self._count], piece[BLOCK - self._count :]
            self._hasher.update(part)
            self._count += len(part)
            if self._count == BLOCK:
                self._done.append(self._hasher.digest())
                self._hasher, self._count = xxhash.xxh3_128(), 0

    def all(self) -> bytes:
        return b"".join([*self._done, *([self._hasher.digest()] if self._count else [])])


def _read(path: Path, size: int, start: int, stop: int) -> memoryview | None:
    """Read a range of a kept file of `size` bytes; None if it is not there, or its blocks have other sums."""
    first, last = start // BLOCK, -(-stop // BLOCK)
    try:
        with path.open("rb") as file:
            data = memoryview(_at(file, first * BLOCK, min(last * BLOCK, size)))
            sums = _at(file, size + first * SUM, size + last * SUM)
            is_whole = file.seek(0, os.SEEK_END) == size + -(-size // BLOCK) * SUM
        os.utime(path)  # it was used now
    # It is not there, for instance.
    except OSError:
        return None
    found = b"".join(xxhash.xxh3_128_digest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK))
    return data[start - first * BLOCK : stop - first * BLOCK] if is_whole and found == sums else None


def _at(file: IO[bytes], start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)
