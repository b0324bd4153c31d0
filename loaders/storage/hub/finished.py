"""The finished files of an output on its way to the Hub, as its journal knows them.

finished/NAME.json  the file's sha256 and size, and whether the Hub has its bytes
bytes/NAME          its bytes; of one that was uploaded, only those that may be read before the output is published
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from loaders.errors import BadCheckpoint, StorageError, io_errors
from loaders.storage.address import Address
from loaders.storage.base import BUFFER, Destination, Entry, Range, Store

INDEX = ".json"


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished file. `ranges` are the bytes that are kept of one that was uploaded; of another, all are."""

    sha256: str
    size: int
    ranges: tuple[Range, ...] | None = None

    @property
    def is_uploaded(self) -> bool:
        return self.ranges is not None


class FinishedFiles(Store):
    """A `Store` of an output's finished files, under the output's names. A file's tag is its sha256."""

    is_local = False

    def __init__(self, address: Address, journal: Destination) -> None:
        self._address = address
        self._journal = journal
        self._seen: dict[Entry, Finished] = {}

    @property
    def address(self) -> Address:
        return self._address

    # --- writing

    def add(self, name: str, data: bytes) -> Entry:
        """Keep a file that will be uploaded with the commit."""
        return self._put(name, Finished(hashlib.sha256(data).hexdigest(), len(data)), data)

    def add_uploaded(self, name: str, part: Path, sha256: str, large: Sequence[Range]) -> Entry:
        """Note that the Hub has a file, and keep its bytes but those of `large`."""
        size = part.stat().st_size
        ranges = tuple(_others(size, large))
        with io_errors("reading", part), part.open("rb") as file:
            kept = b"".join(_read(file, start, stop) for start, stop in ranges)
        return self._put(name, Finished(sha256, size, ranges), kept)

    def _put(self, name: str, file: Finished, data: bytes) -> Entry:
        self._journal.put(f"bytes/{name}", data)
        self._journal.put(f"finished/{name}{INDEX}", json.dumps(asdict(file)).encode())
        return Entry(name, file.size, file.sha256)

    def drop(self, name: str) -> None:
        self._journal.drop(f"finished/{name}{INDEX}")
        self._journal.drop(f"bytes/{name}")

    # --- reading

    def all(self) -> dict[str, Finished]:
        """Return all finished files by name."""
        found = {}
        for entry in self._journal.list("finished"):
            if entry not in self._seen and (file := self._get(entry.name)) is not None:
                self._seen[entry] = file
            if entry in self._seen:
                found[entry.name.removesuffix(INDEX)] = self._seen[entry]
        return found

    def get(self, name: str) -> Finished | None:
        return self._get(f"{name}{INDEX}")

    def _get(self, name: str) -> Finished | None:
        raw = self._journal.get(f"finished/{name}")
        if raw is None:
            return None
        # A crash of the machine may leave a file without its bytes; the unit is then done again.
        try:
            row = json.loads(raw)
            ranges = None if row["ranges"] is None else tuple((int(start), int(stop)) for start, stop in row["ranges"])
            return Finished(str(row["sha256"]), int(row["size"]), ranges)
        except (ValueError, KeyError, TypeError):
            return None

    def data(self, name: str) -> bytes:
        """Return all that is kept of a file.

        Raises:
            StorageError: it is gone.
        """
        found = self._journal.get(f"bytes/{name}")
        if found is None:
            raise StorageError(f"{name}: it is gone from {self._journal.journal}; run the same command again")
        return found

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        files = sorted(self.all().items())
        return tuple(Entry(name, file.size, file.sha256) for name, file in files if deep or "/" not in name)

    def find(self, name: str) -> Entry | None:
        file = self.get(name)
        return None if file is None else Entry(name, file.size, file.sha256)

    def check_inside(self, name: str, *, may_leave: bool = False) -> None:
        """Do nothing: there are no links."""

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        file = self.get(entry.name)
        if file is None or file.sha256 != entry.tag:
            raise BadCheckpoint(f"{entry.name}: it changed while it was read; run the same command again")
        if stop > file.size:
            raise BadCheckpoint(f"{entry.name}: it ends at byte {file.size}, expected {stop}; fetch it again")
        kept = ((0, file.size),) if file.ranges is None else file.ranges
        is_kept = any(first <= start and stop <= end for first, end in kept)
        # Who reads a header reads ahead, and does not look at what comes behind it.
        is_header = any(first <= start < end for first, end in kept) and stop - start <= BUFFER
        if not is_kept and not is_header and start < stop:
            raise StorageError(
                f"{entry.name}: bytes {start} to {stop} were uploaded and are not here; they can be read when the"
                " output is published"
            )
        return self._between(self.data(entry.name), kept, start, stop)

    def _between(self, data: bytes, kept: Sequence[Range], start: int, stop: int) -> memoryview:
        """Return bytes [start, stop) as far as they are kept, and zeros for the others."""
        found, at = memoryview(bytearray(stop - start)), 0
        for first, end in kept:
            low, high = max(first, start), min(end, stop)
            if low < high:
                found[low - start : high - start] = data[at + low - first : at + high - first]
            at += end - first
        return found

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        return (self.read(entry, start, stop) for start, stop in ranges)

    def check_unchanged(self, entry: Entry) -> None:
        """Do nothing: every read checks it."""

    def local_path(self, name: str) -> Path | None:
        return None


def _others(size: int, large: Sequence[Range]) -> Iterator[Range]:
    """Yield the ranges between those in `large`, in order."""
    at = 0
    for start, stop in [*sorted(large), (size, size)]:
        if at < start:
            yield at, start
        at = max(at, stop)


def _read(file: IO[bytes], start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)
