"""The objects below a prefix on the server, as a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from loaders.errors import BadCheckpoint
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT, Entry, Range
from tests.shelf.client import Client

HIDDEN = ".weightmill/"  # the prefix of journals, below their outputs' addresses


def key_of(address: Address) -> str:
    return urlsplit(address.text).path.lstrip("/")


class Shelf:
    """A `Store` of objects below a prefix. A file's tag is its version."""

    is_local = False

    def __init__(self, address: Address) -> None:
        self.address = address
        self._client = Client(address)
        self._prefix = f"{key_of(address)}/".lstrip("/")

    def absence(self) -> str | None:
        rows = [key.removeprefix(self._prefix) for key, _, _ in self._client.list(self._prefix)]
        if not rows:
            return "nothing there"
        is_under_way = any(name.startswith(HIDDEN) for name in rows) and OUR_REPORT not in rows
        return "an output under way" if is_under_way else None

    def is_taken(self) -> bool:
        return self.absence() is None

    def is_link(self) -> bool:
        return False

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        rows = [(key.removeprefix(self._prefix), *rest) for key, *rest in self._client.list(self._prefix)]
        return tuple(
            Entry(name, size, version)
            for name, size, version in rows
            if HIDDEN not in name and (deep or "/" not in name)
        )

    def find(self, name: str) -> Entry | None:
        if name.startswith("/") or ".." in name.split("/"):
            raise BadCheckpoint(f"{name!r} leads out of {self.address}; do not trust what names it")
        found = self._client.list(self._prefix + name)
        return next((Entry(name, size, version) for key, size, version in found if key == self._prefix + name), None)

    def check_inside(self, name: str, *, may_leave: bool = False) -> None:
        """Do nothing: there are no links."""

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        if stop > entry.size:
            raise BadCheckpoint(f"{entry.name}: it ends at byte {entry.size}, expected {stop}; fetch it again")
        if start == stop:
            return memoryview(b"")
        return memoryview(bytearray(self._client.get(self._prefix + entry.name, start, stop, entry.tag)))

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        return (self.read(entry, start, stop) for start, stop in ranges)

    def check_unchanged(self, entry: Entry) -> None:
        """Do nothing: every read is for a version, and fails for another."""

    def local_path(self, name: str) -> Path | None:
        return None
