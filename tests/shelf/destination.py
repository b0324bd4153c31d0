"""An unpublished output on the server: its journal is hidden below it, and publishing means writing the last files."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import xxhash

from loaders.errors import BadSpec
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT, Abandoned, Entry, Range, Store
from loaders.storage.with_staged import WithStaged
from tests.shelf.client import Client, Refused
from tests.shelf.store import HIDDEN, Shelf, key_of


class ShelfDestination:
    """A `Destination` on the server. Nothing can be renamed, so finished files have their final names at once.

    The staged files (index, config.json, report), without which nobody takes them for a checkpoint, are written last.
    """

    is_local = False
    assembles = False

    def __init__(self, address: Address, key: str) -> None:
        self.address = address
        self.journal = address / f"{HIDDEN}{key[:12]}"
        self._client = Client(address)
        self._scratch = Path(tempfile.gettempdir()) / f"shelf-{key[:12]}"

    def _key(self, name: str) -> str:
        area, _, rest = name.partition("/")
        return f"{key_of(self.address)}/{rest}" if area == "files" else f"{key_of(self.journal)}/{name}"

    @property
    def files(self) -> Store:
        return WithStaged(Shelf(self.address), Shelf(self.journal / "staged"))

    @property
    def pieces(self) -> Store:
        return Shelf(self.journal / "pieces")

    def prepare(self, *, overwrite: bool) -> None:
        self.put("begun", b"")
        if overwrite:
            # New files will replace the old output's one by one. Without these two, no reader takes the mixture for a
            # checkpoint.
            for name in ("config.json", OUR_REPORT):
                self.drop(f"files/{name}")

    def is_there(self) -> bool:
        return self.get("begun") is not None

    @contextmanager
    def claim(self) -> Iterator[str | None]:
        if (other := self._claimed()) is not None:
            yield f"{socket.gethostname()} pid {other}"
            return
        try:
            yield None
        finally:
            self.drop("claim")

    def _claimed(self) -> int | None:
        """Try to claim the journal: returns None, or the id of the process that holds it.

        The claim of a process that has ended is taken over. The condition on the claim's version ensures that only one
        of several processes succeeds.
        """
        own, journal = str(os.getpid()).encode(), Shelf(self.journal)
        found = journal.find("claim")
        # Another process has claimed it since `find`.
        with suppress(Refused):
            condition = {"If_None_Match": "*"} if found is None else {"If_Match": found.tag}
            if found is None or not is_alive(int(bytes(journal.read(found, 0, found.size)))):
                self._client.put(self._key("claim"), own, **condition)
                return None
        return int(self.get("claim") or 0)

    def put(self, name: str, data: bytes) -> None:
        self._client.put(self._key(name), data)

    def get(self, name: str) -> bytes | None:
        found = Shelf(self.journal).find(name)
        return None if found is None else bytes(Shelf(self.journal).read(found, 0, found.size))

    def list(self, area: str) -> tuple[Entry, ...]:
        return self.files.list() if area == "files" else Shelf(self.journal / area).list()

    def drop(self, name: str) -> None:
        self._client.delete(self._key(name))

    def scratch(self, name: str) -> Path:
        self._scratch.mkdir(exist_ok=True)
        return self._scratch / name

    def keep(self, part: Path, name: str, large: Sequence[Range] = ()) -> Entry:
        data = part.read_bytes()
        version = self._client.put(self._key(name), data, x_xxh3=xxhash.xxh3_128_hexdigest(data))
        part.unlink()
        return Entry(name, len(data), version)

    def shared(self, name: str, size: int | None = None) -> Path | None:
        return None

    def assemble(
        self, name: str, pieces: Sequence[tuple[int, str]], around: Sequence[tuple[int, bytes]], size: int
    ) -> NoReturn:
        raise NotImplementedError("nothing is written in place here")

    def join(self, name: str, chunks: Iterator[bytes], size: int, large: Sequence[Range] = ()) -> Entry:
        # Test models are small; a real store would upload in parts.
        data = b"".join(chunks)
        assert len(data) == size
        return Entry(name, size, self._client.put(self._key(name), data))

    def stage(self, name: str, data: bytes) -> None:
        self.put(f"staged/{name}", data)
        order = json.loads(self.get("order") or b"[]")
        self.put("order", json.dumps([*(each for each in order if each != name), name]).encode())

    def holds(self, written: Entry, digest: str, start: int | None = None) -> bool:
        area, _, rest = written.name.partition("/")
        found = (self.files if area == "files" else self.pieces).find(rest)
        return found is not None and (found.size, found.tag) == (written.size, written.tag)

    def publish(self, *, overwrite: bool) -> None:
        for name in json.loads(self.get("order") or b"[]"):
            data = self.get(f"staged/{name}")
            assert data is not None
            try:
                self._client.put(self._key(f"files/{name}"), data, **({} if overwrite else {"If_None_Match": "*"}))
            # It exists: from an interrupted attempt of this job, or from another job.
            except Refused:
                there = Shelf(self.address).find(name)
                if there is None or bytes(Shelf(self.address).read(there, 0, there.size)) != data:
                    raise BadSpec(f"{self.address} came into being while the job ran") from None

    def forget(self) -> None:
        discard(self.journal)
        # It does not exist, or holds parts of another process.
        with suppress(OSError):
            self._scratch.rmdir()

    def forget_empty(self) -> None:
        """A prefix without objects is nothing."""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def abandoned_at(place: Address, name: str | None = None) -> tuple[Abandoned, ...]:
    """List the journals at an address of outputs: of all outputs, or of the output with a name."""
    found: dict[Address, list[Entry]] = {}
    top, client = f"{key_of(place)}/".lstrip("/"), Client(place)
    for key, size, version in client.list(top):
        match = re.fullmatch(rf"([^/]+)/{re.escape(HIDDEN)}([0-9a-f]{{12}})/(.+)", key.removeprefix(top))
        if match is not None and name in (None, match[1]):
            found.setdefault(place / match[1] / f"{HIDDEN}{match[2]}", []).append(Entry(match[3], size, version))
    return tuple(
        Abandoned(
            address=journal,
            size=sum(entry.size for entry in entries),
            units_done=sum(entry.name.startswith("records/") for entry in entries),
            age_s=0.0,  # objects of this store have no time
            is_held=any(entry.name == "claim" for entry in entries),
        )
        for journal, entries in found.items()
    )


def discard(journal: Address) -> None:
    client = Client(journal)
    for key, _, _ in client.list(f"{key_of(journal)}/"):
        client.delete(key)
