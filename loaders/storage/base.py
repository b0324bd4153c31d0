"""Where bytes lie: what a store of files offers to be read, and what a destination offers to be written.

Nothing outside this folder knows whether files lie in a folder, a bucket or a repository. What is read is pinned: an
`Entry` names a version, and reading another one is an error.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from loaders.errors import BadCheckpoint, BadSpec
from loaders.storage.address import Address

BUFFER = 1 << 20  # bytes fetched at once where a header is read a few bytes at a time
Range = tuple[int, int]  # bytes [start, stop)


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A file of a store: its path from the store's root, its size in bytes, and a tag that another version lacks."""

    name: str
    size: int
    tag: str


class Store(Protocol):
    """Files to be read. Names are paths from the root, with slashes."""

    @property
    def address(self) -> Address:
        """Where it is: enough to open it again in another process, whose environment has the credentials."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether files have paths here, and can be mapped."""
        ...

    def absence(self) -> str | None:
        """What is there instead, if there is nothing to list: "nothing there", "a file; ..."; None if there is."""
        ...

    def is_taken(self) -> bool:
        """Whether anything stands at the address, whatever it is; what an unfinished job left does not count."""
        ...

    def is_link(self) -> bool:
        """Whether the address is that of a link to another place."""
        ...

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        """List the files by name; those of sub-folders too if `deep`. Empty where there is nothing.

        Folders of tools (.git, ...) and what is no plain file are left out, but for who wants to see `every` thing.

        Raises:
            StorageError: it cannot be listed.
        """
        ...

    def find(self, name: str) -> Entry | None:
        """Look a file up; None if there is none of this name."""
        ...

    def check_inside(self, name: str) -> None:
        """Raise BadCheckpoint if a file's bytes lie outside the store: behind a link that leads out of a folder."""
        ...

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        """Read bytes [start, stop) of a file.

        Raises:
            BadCheckpoint: the file is shorter, or is no longer this version.
            StorageError: it is gone, or cannot be read.
        """
        ...

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        """Read ranges of a file, several at a time where that is faster; they come in this order. Errors as `read`."""
        ...

    def check_unchanged(self, entry: Entry) -> None:
        """Look whether a file is still this version, where reading it does not tell.

        Raises:
            BadCheckpoint: it is another.
            StorageError: it is gone.
        """
        ...

    def local_path(self, name: str) -> Path | None:
        """The path of a file, if this store is local; None otherwise."""
        ...


class Destination(Protocol):
    """An output under way, for the job that a key names: its journal, its files, and the step that publishes them.

    Names are those of the areas below. Whoever looks at the output's address before `publish` finds no checkpoint
    there; after it, all of it.

        files/NAME     a finished file of the output, NAME as in the output
        pieces/NAME    a finished range of a file, made apart by one of several processes
        records/NAME   what a unit left
        other names    small files of the journal
    """

    @property
    def address(self) -> Address:
        """Of the output."""
        ...

    @property
    def journal(self) -> Address:
        """Where the journal lies, for messages."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether parts can be written in place, and finished files have paths."""
        ...

    @property
    def files(self) -> Store:
        """The finished files, under the names of the output, as a checkpoint would be read there."""
        ...

    @property
    def pieces(self) -> Store:
        """The finished pieces that were made apart."""
        ...

    def prepare(self, *, overwrite: bool) -> None:
        """Make what writing needs; with `overwrite`, an output at the address may lose its validity from here on.

        Raises:
            StorageError: it cannot be made.
        """
        ...

    def is_there(self) -> bool:
        """Whether `prepare` was called by anybody, and nobody forgot it since."""
        ...

    def claim(self) -> AbstractContextManager[str | None]:
        """Keep other drivers out for as long as the block lasts; gives who is in, where that is another."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, whole or not at all, durably.

        Raises:
            StorageError: it cannot be written.
        """
        ...

    def get(self, name: str) -> bytes | None:
        """Read a small file; None if there is none."""
        ...

    def list(self, area: str) -> tuple[Entry, ...]:
        """List what is in an area ("files", "pieces", "records"), under the names within it."""
        ...

    def drop(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def scratch(self, name: str) -> Path:
        """A path at which a part may be made; the file must not be there yet. `keep` or the caller removes it."""
        ...

    def keep(self, part: Path, name: str) -> Entry:
        """Put a part, whole and synced, among the finished files or pieces, in place of what has the name.

        Raises:
            StorageError: it cannot be moved or uploaded, or arrived otherwise than it was sent.
        """
        ...

    def shared(self, name: str, size: int | None = None) -> Path | None:
        """The path of a file that parts are written into in place; None where the destination has no such thing.

        With a `size`, all its room is taken; what was written into it before stays.
        """
        ...

    def assemble(
        self, name: str, pieces: Sequence[tuple[int, str]], around: Sequence[tuple[int, bytes]], size: int
    ) -> None:
        """Make a shared file whole: put pieces that were made apart at their bytes, and what stands around them.

        Pieces are removed once they are durable in the file. Only where `is_local`.
        """
        ...

    def join(self, name: str, chunks: Iterator[bytes], size: int) -> Entry:
        """Make a finished file from its bytes, in order, without a copy on this machine. Errors as `keep`."""
        ...

    def stage(self, name: str, data: bytes) -> None:
        """Make a small file that is taken for the sign of a whole checkpoint: an index, a config.json.

        It is among `files` at once; at the output's address `publish` puts it last, in the order of staging.
        """
        ...

    def holds(self, written: Entry, digest: str, start: int | None = None) -> bool:
        """Whether a file or piece is what a record says, by its tag or by its xxh3-128; with a `start`, whether a file
        of several pieces has it from that byte on.
        """
        ...

    def publish(self, *, overwrite: bool) -> None:
        """Make the output visible.

        Raises:
            BadSpec: something else came to be there.
            StorageError: it cannot be made visible.
        """
        ...

    def forget(self) -> None:
        """Remove the journal, and all that was not published."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned:
    """What an interrupted job left: where its journal is, and how much."""

    address: Address
    size: int  # bytes
    units_done: int
    age_s: float  # since something of it changed
    is_held: bool  # a process works on it


class PinnedFiles:
    """Files of a store, each at the version at which it was listed or first looked up."""

    def __init__(self, store: Store, entries: Iterable[Entry] = ()) -> None:
        self.store = store
        self._entries: dict[str, Entry] = {entry.name: entry for entry in entries}

    @property
    def address(self) -> Address:
        return self.store.address

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Those that are known so far."""
        return self._entries

    def find(self, name: str) -> Entry | None:
        """Look a file up; None if there is none."""
        found = self._entries.get(name) or self.store.find(name)
        if found is not None:
            self._entries[name] = found
        return found

    def entry(self, name: str) -> Entry:
        """Look a file up.

        Raises:
            BadCheckpoint: there is none.
        """
        found = self.find(name)
        if found is None:
            raise BadCheckpoint(f"{name}: not found in {self.address}; fetch the checkpoint again")
        return found

    def check_unchanged(self) -> None:
        """Look whether all known files are still the versions that they were. Errors as `Store.check_unchanged`."""
        for entry in self._entries.values():
            self.store.check_unchanged(entry)

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Read bytes [start, stop) of a file; errors as `Store.read`."""
        return self.store.read(self.entry(name), start, stop)

    def read_all(self, name: str, limit: int) -> bytes:
        """Read a small file.

        Raises:
            BadCheckpoint: it is missing, or has more than `limit` bytes; or as `Store.read`.
        """
        entry = self.entry(name)
        if entry.size > limit:
            raise BadCheckpoint(f"{name}: {entry.size} bytes, at most {limit} are read")
        return bytes(self.store.read(entry, 0, entry.size))

    def open(self, name: str) -> IO[bytes]:
        """Open a file to be read from any place on, through a buffer. Errors as `Store.read`, at each read."""
        return io.BufferedReader(_Ranged(self.store, self.entry(name)), BUFFER)

    def path(self, name: str, why: str) -> Path:
        """The path of a file.

        Raises:
            BadSpec: the store is not local; `why` says who needs it to be.
        """
        found = self.store.local_path(name)
        if found is None:
            raise BadSpec(f"{why}, and {self.address} is no folder of this machine; fetch it into one first")
        return found


class _Ranged(io.RawIOBase):
    """A file of a store as a stream."""

    def __init__(self, store: Store, entry: Entry) -> None:
        super().__init__()
        self._store = store
        self._entry = entry
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._entry.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, f"seek to byte {base + offset} of {self._entry.name}")  # as files do
        self._at = base + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        stop = min(self._at + len(buffer), self._entry.size)
        if stop <= self._at:
            return 0
        found = self._store.read(self._entry, self._at, stop)
        buffer[: len(found)] = found
        self._at = stop
        return len(found)
