"""The protocols of storage: a `Store` is files to read, a `Destination` is an output under construction.

No code outside this folder knows whether files are in a folder, a bucket or a repository. Reads are pinned: an `Entry`
names one version of a file, and reading another version is an error.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from loaders.errors import BadCheckpoint, BadSpec
from loaders.storage.address import Address

# Bytes that one request fetches when a header is parsed a few bytes at a time. Less would cost a remote store more
# requests for one header; more would fetch weights that are not needed.
BUFFER = 1 << 20
LOOKS = 8  # files of a store that are looked at at once: nearly all of the time is latency
Range = tuple[int, int]  # bytes [start, stop)
READ_BEFORE_PUBLISHING = 4096  # bytes of the largest tensor (a scale, a shape) that lint reads till then
OUR_REPORT = "weightmill.json"  # the file that every complete output has, and that is put there last
OUR_PAGE = "report.html"  # what it says, for a browser


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One version of a file in a store: its path from the store's root, its size in bytes, and a version tag.

    The tag is the store's own (a time of change, an ETag, a hash); two versions of a file have different tags.
    """

    name: str
    size: int
    tag: str


class Store(Protocol):
    """Files to read, by name: a path with forward slashes. What is said here is of a store that is there."""

    @property
    def address(self) -> Address:
        """The store's address. Another process can open the store by it, if its environment has the credentials."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether files have paths on this machine, so that they can be memory-mapped."""
        ...

    def absence(self) -> str | None:
        """Say what is at the address if it is no folder of files ("nothing there", "a file; ..."); None if it is.

        It follows "expected a folder of weights at ..., found" in messages. A store without a rename, where an output's
        files get their names before it is published, also says so of an output that lacks OUR_REPORT: "an output under
        way".
        """
        return None

    def is_taken(self) -> bool:
        """Whether anything exists at the address. The journal of an unfinished job does not count."""
        return True

    def is_link(self) -> bool:
        """Whether the address is a symbolic link."""
        return False

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        """List the files, sorted by name, including those of sub-folders if `deep`. Empty if nothing exists.

        Folders of tools (.git, ...) are left out, unless `every` is set.

        Raises:
            StorageError: the store cannot be listed.
            BadCheckpoint: a FIFO, a socket, a device or a link to nothing is there, and `every` is not set.
        """
        ...

    def find(self, name: str) -> Entry | None:
        """Look up a file by name; None if it does not exist."""
        ...

    def check_inside(self, name: str, *, may_leave: bool = False) -> str | None:
        """Check that a file's bytes are inside the store; returns where they are if they are not, and None if they are.

        Only if it `may_leave` may it be a symbolic link to a file elsewhere: one that has the same suffix, or a hash
        for its name.

        Raises:
            BadCheckpoint: the file is another symbolic link that leads out of the store's folder.
        """
        ...

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        """Read bytes [start, stop) of a file.

        Raises:
            BadCheckpoint: the file is shorter than `stop`, or is another version than the entry's.
            StorageError: the file is gone, or cannot be read.
        """
        ...

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        """Read ranges of a file, concurrently where that is faster; results keep the order. Errors as `read`."""
        ...

    def check_unchanged(self, entry: Entry) -> None:
        """Check that a file is still the entry's version. Needed where files are mapped, since a map does not tell.

        Raises:
            BadCheckpoint: it is another version.
            StorageError: it is gone.
        """
        ...

    def local_path(self, name: str) -> Path | None:
        """Return the path of a file on this machine; None if the store is not local."""
        ...


class Destination(Protocol):
    """An unpublished output of one job: its journal, its finished files, and the step that publishes them.

    Before `publish`, a reader of the output's address finds no checkpoint there; afterwards, a complete one. The key
    that a destination is opened with names the job, so a rerun of the same job finds its own journal. Names begin with
    one of these areas:

        files/NAME     a finished file of the output, NAME as in the output
        pieces/NAME    a finished range of a file, written as a file of its own by one of several processes
        records/NAME   the record of a finished unit
        other names    small files of the journal
    """

    @property
    def address(self) -> Address:
        """The output's address."""
        ...

    @property
    def journal(self) -> Address:
        """The journal's address, for messages."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether files can be written in place, and finished files have paths on this machine."""
        ...

    @property
    def assembles(self) -> bool:
        """Whether `assemble` can be used; else a file of several pieces is streamed by `join`."""
        ...

    @property
    def files(self) -> Store:
        """The finished files under the names of the output, to be read as a checkpoint."""
        ...

    @property
    def pieces(self) -> Store:
        """The finished pieces."""
        ...

    def prepare(self, *, overwrite: bool) -> None:
        """Create the journal. With `overwrite`, an existing output at the address may become invalid from now on.

        Raises:
            StorageError: it cannot be created.
        """
        ...

    def is_there(self) -> bool:
        """Whether the journal exists: `prepare` was called, by any process, and `forget` was not called since."""
        ...

    def claim(self) -> AbstractContextManager[str | None]:
        """Exclude other drivers for the length of the block; yields the name of the holder if another one has it.

        The name is for messages and has what finds the process: host and process id ("HOST pid N"). The claim of a
        process that has ended is free.
        """
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write a small file atomically and durably.

        Raises:
            StorageError: it cannot be written.
        """
        ...

    def get(self, name: str) -> bytes | None:
        """Read a small file; None if it does not exist."""
        ...

    def list(self, area: str) -> tuple[Entry, ...]:
        """List an area ("files", "pieces", "records"); the entries' names leave out the area."""
        ...

    def drop(self, name: str) -> None:
        """Remove a file if it exists."""
        ...

    def scratch(self, name: str) -> Path:
        """Return a local path for a part file to be created at. `keep` moves it away, or the caller removes it."""
        ...

    def keep(self, part: Path, name: str, large: Sequence[Range] = ()) -> Entry:
        """Move or upload a complete, synced part file to a name in files/ or pieces/, replacing what has that name.

        Nobody will read the ranges in `large` before the output is published: a destination may not be able to.

        Raises:
            StorageError: it cannot be moved or uploaded, or its checksum after the upload is wrong.
        """
        ...

    def shared(self, name: str, size: int | None = None) -> Path | None:
        """Return the path of a file that several units write into in place; None if the destination has none.

        With a `size`, the file is created and its space reserved; what was written into it before stays.
        """
        ...

    def assemble(
        self, name: str, pieces: Sequence[tuple[int, str]], around: Sequence[tuple[int, bytes]], size: int
    ) -> None:
        """Complete a file of several pieces: copy these to their offsets, and write the other bytes, `around` them.

        A piece is removed as soon as its bytes are durable in the file. Only for destinations that assemble: local
        ones, and stores that copy by themselves; for these, pieces and other bytes fill the whole file.

        Raises:
            StorageError: it cannot be written.
        """
        ...

    def join(self, name: str, chunks: Iterator[bytes], size: int, large: Sequence[Range] = ()) -> Entry:
        """Make a finished file of `size` bytes from its chunks, in order; `large` is as for `keep`.

        Raises:
            As `keep`.
        """
        ...

    def stage(self, name: str, data: bytes) -> None:
        """Write a small file whose presence marks a complete checkpoint: an index, a config.json, then OUR_REPORT.

        It is in `files` at once, but `publish` puts it at the output's address last, in the order of staging, so that
        OUR_REPORT, the mark of a complete output, comes after everything else.
        """
        ...

    def holds(self, written: Entry, digest: str, start: int | None = None) -> bool:
        """Whether a finished file or piece still is what its record says, by its tag or its xxh3-128 digest.

        With a `start`, `written` is a range of a shared file, which begins at that byte.
        """
        ...

    def publish(self, *, overwrite: bool) -> None:
        """Make the output visible at its address.

        Raises:
            BadSpec: another output appeared there while the job ran, and `overwrite` is not set.
            StorageError: the output cannot be moved there.
        """
        ...

    def forget(self) -> None:
        """Remove the journal and everything in it that was not published."""
        ...

    def forget_empty(self) -> None:
        """Remove a journal in which nothing is, as a kill at the end of `forget` leaves it; leave any other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned:
    """The journal of an interrupted job: its address, size and age."""

    address: Address
    size: int  # bytes
    units_done: int
    age_s: float  # seconds since the newest file in it changed
    is_held: bool  # whether a process holds its lock, so the job is running
    ages_s: Mapping[str, float] = field(default_factory=dict)  # since each small file changed, by the store's time


class PinnedFiles:
    """Files of a store, each pinned to the version that was seen first.

    Headers and weights of one checkpoint are read at different times; if a file changes in between, the read fails.
    """

    def __init__(self, store: Store, entries: Iterable[Entry] = ()) -> None:
        self.store = store
        self._entries: dict[str, Entry] = {entry.name: entry for entry in entries}

    @property
    def address(self) -> Address:
        return self.store.address

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The entries pinned so far, by name."""
        return self._entries

    def find(self, name: str) -> Entry | None:
        """Look up a file and pin its version; None if it does not exist."""
        found = self._entries.get(name) or self.store.find(name)
        if found is not None:
            self._entries[name] = found
        return found

    def entry(self, name: str) -> Entry:
        """Look up a file and pin its version.

        Raises:
            BadCheckpoint: it does not exist.
        """
        found = self.find(name)
        if found is None:
            raise BadCheckpoint(f"{name}: not found in {self.address}; fetch the checkpoint again")
        return found

    def check_unchanged(self) -> None:
        """Check that every pinned file is still the pinned version. Errors as `Store.check_unchanged`."""
        for entry in self._entries.values():
            self.store.check_unchanged(entry)

    def pin(self, entries: Iterable[Entry]) -> None:
        """Pin files to versions that were listed; those that are pinned stay so."""
        for entry in entries:
            self._entries.setdefault(entry.name, entry)

    def look_again(self, names: Iterable[str]) -> None:
        """Look whether files still are the pinned versions. Raises BadCheckpoint if one is another, or gone."""
        wanted = [self.entry(name) for name in names]
        if self.store.is_local:
            for entry in wanted:
                self.store.check_unchanged(entry)
            return
        with ThreadPoolExecutor(LOOKS) as pool:
            found = pool.map(lambda entry: self.store.find(entry.name), wanted)
            for entry, now in zip(wanted, found, strict=True):
                if now is None or (now.size, now.tag) != (entry.size, entry.tag):
                    what = "it is gone" if now is None else f"{entry.size} bytes when it was read, {now.size} now"
                    raise BadCheckpoint(f"{entry.name}: it changed while it was read: {what}; load it again")

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """Read bytes [start, stop) of a file; errors as `Store.read`."""
        return self.store.read(self.entry(name), start, stop)

    def read_all(self, name: str, limit: int) -> bytes:
        """Read a whole file that is small.

        Raises:
            BadCheckpoint: it is missing, or has more than `limit` bytes; and as `Store.read`.
        """
        entry = self.entry(name)
        if entry.size > limit:
            raise BadCheckpoint(f"{name}: {entry.size} bytes, at most {limit} are read")
        return bytes(self.store.read(entry, 0, entry.size))

    def open(self, name: str) -> IO[bytes]:
        """Open a file as a seekable, buffered stream. Each read raises as `Store.read` does."""
        return io.BufferedReader(_Ranged(self.store, self.entry(name)), BUFFER)

    def path(self, name: str, why: str) -> Path:
        """Return the path of a file on this machine.

        Raises:
            BadSpec: the store is not local; `why` begins the message and says who needs a local path.
        """
        found = self.store.local_path(name)
        if found is None:
            raise BadSpec(f"{why}, and {self.address} is no folder of this machine; fetch it into one first")
        return found


class _Ranged(io.RawIOBase):
    """One file of a store as a raw, seekable stream, for parsers that read files (zip, pickle)."""

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
            # zipfile seeks before the start of a file that is too short, and expects the OSError that files raise.
            raise OSError(errno.EINVAL, f"seek to byte {base + offset} of {self._entry.name}")
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
