"""Files of servers that send no ranges: fetched whole into the cache folder, and read there.

Without a cache they are refused: each range would move the whole file once more.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from loaders.errors import BadSpec, StorageError, io_errors
from loaders.storage.atomic import file_lock
from loaders.storage.base import Entry
from loaders.storage.folder import Folder
from loaders.storage.objects.client import ObjectClient
from loaders.storage.patience import Passing
from loaders.storage.range_cache import RangeCache, cache_of


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
        if not path.is_file():
            with file_lock(path):
                if not path.is_file():
                    cache.make_room(entry.size)
                    self._fetch(key, entry, path)
        there = Folder(folder).entry_of(name)
        with suppress(OSError):  # it is read, or the error is raised, below
            os.utime(path, ns=(time.time_ns(), int(there.tag)))  # it was used now
        return Folder(folder).read(there, start, stop)

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
            count = sum(file.write(piece) for piece in self._counted(body))
            file.flush()
            os.fsync(file.fileno())
        if count != entry.size:
            raise Passing(f"the body had {count} bytes, expected {entry.size}")

    def _counted(self, body: Iterator[memoryview]) -> Iterator[memoryview]:
        for piece in body:
            self._client.traffic.moved(fetched=len(piece))
            yield piece
