"""A cache on a local disk of what was fetched from stores that are not local, which processes and jobs share.

A file of the cache is one range of one version of an object, as it was fetched: its bytes, then their xxh3-128. A file
that is damaged counts as missing, so that nothing has to be durable. Which ranges are there is seen from the names of
the files, so that a range is found whatever pieces it was fetched in. Whole files, of servers that send no ranges, have
a folder of their own there, and count for the same limit.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import xxhash

from loaders.storage.address import Address
from loaders.storage.atomic import exclusive
from loaders.storage.base import Entry, Range, Store
from loaders.storage.hashes import text_digest
from loaders.storage.settings import StoreSettings

log = logging.getLogger("weightmill")
GB = 1_000_000_000
SUM = 16  # bytes of the checksum behind the data
PIECE = 16 << 20  # bytes of a file at most: all of one is read to check it
# The folder is looked through again when this share of its limit was written: what other processes write is not known.
LOOK_SHARE = 0.02
ROOM_SHARE = 0.9  # of its limit, what is left when old files are removed, so that this is not done at every write
UNVERSIONED = "unknown"  # the tag of stores that give no versions, of which nothing is kept


class RangeCache:
    """A folder of ranges, of at most `limit` bytes. Any error of its disk switches it off, with a note."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.whole = folder / "whole"
        self._folder = folder
        self._limit = limit
        self._lock = threading.Lock()
        self._unseen = limit  # bytes written since the folder was looked through; at first, that is due
        self._is_off = False

    def get(self, key: str, start: int, stop: int) -> dict[Range, memoryview]:
        """Return what is there of a range of an object, by ranges that do not overlap, in order."""
        found: dict[Range, memoryview] = {}
        at = start
        for first, last in self._ranges(key):
            if last <= at or first >= stop:
                continue
            data = self._read(key, first, last)
            if data is not None:
                begin, end = max(first, at), min(last, stop)
                found[begin, end] = data[begin - first : end - first]
                at = end
        return found

    def _ranges(self, key: str) -> list[Range]:
        names = []
        # Nothing of the object is there yet.
        with suppress(OSError):
            names = os.listdir(self._folder / key)  # noqa: PTH208  # once a read, and without a Path for each name
        return sorted(
            (int(a), int(b)) for a, _, b in (name.partition("-") for name in names) if a.isdigit() and b.isdigit()
        )

    def _read(self, key: str, start: int, stop: int) -> memoryview | None:
        path = self._path(key, start, stop)
        try:
            raw = path.read_bytes()
            os.utime(path)  # it was used now
        # Removed by another process, for instance.
        except OSError:
            return None
        data = memoryview(raw)[:-SUM]
        if len(data) != stop - start or xxhash.xxh3_128_digest(data) != raw[-SUM:]:
            with suppress(OSError):
                path.unlink()
            return None
        return data

    def put(self, key: str, start: int, data: memoryview) -> None:
        for at in range(0, len(data), PIECE):
            self._write(key, start + at, data[at : at + PIECE])

    def _write(self, key: str, start: int, data: memoryview) -> None:
        if self._is_off:
            return
        path = self._path(key, start, start + len(data))
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.make_room(len(data) + SUM)
            try:
                with part.open("wb") as file:
                    file.write(data)
                    file.write(xxhash.xxh3_128_digest(data))
                part.replace(path)
            except BaseException:
                # The first error is the one to report.
                with suppress(OSError):
                    part.unlink()
                raise
        # A folder that another process has just removed as empty is no reason to stop.
        except FileNotFoundError:
            return
        except OSError as error:
            with self._lock:
                if not self._is_off:
                    log.warning("%s: nothing more is kept there: %s", self._folder, error.strerror or error)
                self._is_off = True

    def _path(self, key: str, start: int, stop: int) -> Path:
        return self._folder / key / f"{start}-{stop}"

    def make_room(self, size: int) -> None:
        """Remove the files that were not used for longest, if so many bytes would be too many. The folder exists."""
        with self._lock:
            self._unseen += size
            if self._unseen < self._limit * LOOK_SHARE:
                return
            self._unseen = 0
        with exclusive(self._folder / "lock") as is_mine:
            if is_mine:  # else another process is at it
                self._clean(size)

    def _clean(self, size: int) -> None:
        files = sorted(self._files())
        total = sum(each for _, each, _ in files) + size
        if total <= self._limit:
            return
        for _, each, path in files:
            if total <= self._limit * ROOM_SHARE:
                return
            with suppress(OSError):  # it is gone already
                path.unlink()
            total -= each
            with suppress(OSError):  # other files are in it
                path.parent.rmdir()

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield the time of the last use, the size and the path of each file, the whole files among them."""
        for folder, _, names in os.walk(self._folder):
            for path in (Path(folder) / name for name in names if Path(folder) != self._folder):
                with suppress(OSError):  # it is gone already
                    status = path.stat()
                    if path.suffix != ".lock":
                        yield status.st_mtime, status.st_size, path


@cache
def _cache_at(folder: Path, limit: int) -> RangeCache:
    """Return the one cache of this process at a folder."""
    return RangeCache(folder, limit)


class CachedStore:
    """A `Store` that fetches from another store only what the cache does not have, and keeps it there.

    Lists and versions are the other store's; so a file that changed is fetched anew.
    """

    is_local = False

    def __init__(self, store: Store, kept: RangeCache) -> None:
        self._store = store
        self._cache = kept

    @property
    def address(self) -> Address:
        return self._store.address

    def absence(self) -> str | None:
        return self._store.absence()

    def is_taken(self) -> bool:
        return self._store.is_taken()

    def is_link(self) -> bool:
        return self._store.is_link()

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        return self._store.list(deep=deep, every=every)

    def find(self, name: str) -> Entry | None:
        return self._store.find(name)

    def check_inside(self, name: str, *, may_leave: bool = False) -> str | None:
        return self._store.check_inside(name, may_leave=may_leave)

    def check_unchanged(self, entry: Entry) -> None:
        self._store.check_unchanged(entry)

    def local_path(self, name: str) -> Path | None:
        return self._store.local_path(name)

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        if entry.tag == UNVERSIONED or not start < stop <= entry.size:
            return self._store.read(entry, start, stop)
        key = text_digest(f"{self.address}\0{entry.name}\0{entry.size}\0{entry.tag}")
        there = self._cache.get(key, start, stop)
        missing = _between(there, start, stop)
        if missing == [(start, stop)]:
            data = self._store.read(entry, start, stop)
            self._cache.put(key, start, data)
            return data
        out = memoryview(bytearray(stop - start))
        for (first, last), known in there.items():
            out[first - start : last - start] = known
        for (first, last), fetched in zip(missing, self._store.read_ranges(entry, missing), strict=True):
            self._cache.put(key, first, fetched)
            out[first - start : last - start] = fetched
        return out

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        return (self.read(entry, start, stop) for start, stop in ranges)


def _between(there: dict[Range, memoryview], start: int, stop: int) -> list[Range]:
    """Return the ranges of [start, stop) that are not there."""
    missing, at = [], start
    for first, last in there:
        if at < first:
            missing.append((at, first))
        at = last
    if at < stop:
        missing.append((at, stop))
    return missing


def cache_of(settings: StoreSettings) -> RangeCache | None:
    """Return the settings' cache; None if they name none."""
    if settings.cache is None:
        return None
    return _cache_at(Path(settings.cache).expanduser() / "ranges", int(settings.cache_gb * GB))


def cached(store: Store, settings: StoreSettings) -> Store:
    """Return a store with the settings' cache; the store itself if there is none, or it is local."""
    kept = cache_of(settings)
    return store if store.is_local or kept is None else CachedStore(store, kept)
