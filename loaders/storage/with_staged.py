"""The files of an output where nothing can be renamed, before it is published: those that go last are staged apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loaders.storage.address import Address
from loaders.storage.base import Entry, Range, Store

STAGED = "staged "  # the prefix of the tag of a staged file


class WithStaged(Store):
    """A `Store` of finished files together with the staged ones, as the output will be after `publish`."""

    is_local = False

    def __init__(self, finished: Store, staged: Store) -> None:
        self._finished = finished
        self._staged = staged

    @property
    def address(self) -> Address:
        return self._finished.address

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        found = {entry.name: entry for entry in self._finished.list(deep=deep, every=every)}
        found |= {entry.name: _marked(entry) for entry in self._staged.list(deep=deep, every=every)}
        return tuple(sorted(found.values()))

    def find(self, name: str) -> Entry | None:
        found = self._staged.find(name)
        return self._finished.find(name) if found is None else _marked(found)

    def check_inside(self, name: str, *, may_leave: bool = False) -> str | None:
        return self._finished.check_inside(name, may_leave=may_leave)

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        store, there = self._place(entry)
        return store.read(there, start, stop)

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        store, there = self._place(entry)
        return store.read_ranges(there, ranges)

    def check_unchanged(self, entry: Entry) -> None:
        store, there = self._place(entry)
        store.check_unchanged(there)

    def local_path(self, name: str) -> Path | None:
        return None

    def _place(self, entry: Entry) -> tuple[Store, Entry]:
        """Return the store that has a file, and its entry there."""
        if entry.tag.startswith(STAGED):
            return self._staged, replace(entry, tag=entry.tag.removeprefix(STAGED))
        return self._finished, entry


def _marked(entry: Entry) -> Entry:
    return replace(entry, tag=f"{STAGED}{entry.tag}")
