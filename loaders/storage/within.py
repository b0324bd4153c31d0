"""A sub-folder of a store as a store of its own: a part of a checkpoint, opened as if it lay by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loaders.storage.address import Address
from loaders.storage.base import Entry, Range, Store


class Within:
    """A `Store` of the files below one folder of another store, under their names from that folder."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self._prefix = f"{folder}/"

    @property
    def address(self) -> Address:
        return self._store.address / self._prefix.rstrip("/")

    @property
    def is_local(self) -> bool:
        return self._store.is_local

    def absence(self) -> str | None:
        return self._store.absence() or (None if self.list() else "nothing there")

    def is_taken(self) -> bool:
        return bool(self.list(every=True))

    def is_link(self) -> bool:
        return False  # stores do not follow linked folders

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        found = (entry for entry in self._store.list(every=every) if entry.name.startswith(self._prefix))
        mine = (replace(entry, name=entry.name.removeprefix(self._prefix)) for entry in found)
        return tuple(entry for entry in mine if deep or "/" not in entry.name)

    def find(self, name: str) -> Entry | None:
        found = self._store.find(self._prefix + name)
        return None if found is None else replace(found, name=name)

    def check_inside(self, name: str, *, may_leave: bool = False) -> str | None:
        return self._store.check_inside(self._prefix + name, may_leave=may_leave)

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        return self._store.read(self._outer(entry), start, stop)

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        return self._store.read_ranges(self._outer(entry), ranges)

    def check_unchanged(self, entry: Entry) -> None:
        self._store.check_unchanged(self._outer(entry))

    def local_path(self, name: str) -> Path | None:
        return self._store.local_path(self._prefix + name)

    def _outer(self, entry: Entry) -> Entry:
        return replace(entry, name=self._prefix + entry.name)
