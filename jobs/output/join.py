"""Joining the pieces that several units wrote of one file.

On a local filesystem, pieces that were written in place are there already, and pieces that several processes wrote as
files of their own are copied into their places; S3 copies pieces by itself, so that no byte is sent twice. Elsewhere,
the pieces are streamed into the file. In all cases every byte is read and hashed once more, and must be what the
pieces' records say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import xxhash

from jobs.output.journal import Done, Journal, Written
from jobs.output.report import FileRange, WeightFile
from loaders.errors import VerifyFailed
from loaders.layouts.base import Joined
from loaders.specs import OutputFile
from loaders.storage.base import READ_BEFORE_PUBLISHING, Range
from loaders.storage.hashes import BLOCK


def join(
    joined: Joined, pieces: Sequence[OutputFile], journal: Journal, done: Sequence[Done],
    on_bytes: Callable[[int], None] = lambda size: None,
) -> WeightFile:  # fmt: skip
    """Join pieces into a finished file; returns its entry for the report. `on_bytes` is told of the file's bytes.

    Raises:
        VerifyFailed: a piece is not what its record says.
        StorageError: the disk is full, ...
    """
    joining = _Joining(joined, pieces, journal, _written(done))
    name, destination = f"files/{joined.name}", journal.destination
    if destination.assembles:
        places = [(start_of(piece), journal.place(piece)) for piece in pieces]
        around = [(0, joined.head), (joining.end, joining.tail)]
        destination.assemble(name, places, around, joining.size)
        for chunk in joining.chunks():
            # The generator hashes the chunks and checks the pieces; the bytes are in the file already.
            on_bytes(len(chunk))
    else:
        destination.join(name, _told(joining.chunks(), on_bytes), joining.size, _large(pieces))
        for piece in pieces:
            destination.drop(journal.place(piece))
    return joining.row()


def joined_size(joined: Joined, pieces: Sequence[OutputFile], journal: Journal, done: Sequence[Done]) -> int:
    """Return the bytes of the file that `join` makes; little of the pieces is read for it."""
    return _Joining(joined, pieces, journal, _written(done)).size


def _written(done: Sequence[Done]) -> dict[str, Written]:
    return {file.name: file for unit in done for file in unit.files}


def _told(chunks: Iterator[bytes], on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        on_bytes(len(chunk))
        yield chunk


class _Joining:
    """A file that is being joined: its bytes in order, which are hashed as they pass."""

    def __init__(
        self, joined: Joined, pieces: Sequence[OutputFile], journal: Journal, written: Mapping[str, Written]
    ) -> None:
        self._joined = joined
        self._pieces = pieces
        self._journal = journal
        self._written = written
        self._whole = xxhash.xxh3_128()
        self.end = start_of(pieces[-1]) + written[pieces[-1].name].size
        # The directory at the end of a PyTorch file repeats the checksums in its members' headers, so it is made from
        # the pieces.
        self.tail = b"" if joined.tail is None else joined.tail.made(self._read)
        self.size = self.end + len(self.tail)

    def _read(self, at: int, size: int) -> bytes:
        """Read bytes of the joined file, all within one piece, before the file exists."""
        piece = next(p for p in reversed(self._pieces) if start_of(p) <= at)
        return self._piece(piece, at - start_of(piece), size)

    def _piece(self, piece: OutputFile, at: int, size: int) -> bytes:
        name, start, entry = self._journal.find(piece)
        destination = self._journal.destination
        if entry is None:
            raise VerifyFailed(f"{piece.name}: it is gone; run the same command again")
        store = destination.pieces if name.startswith("pieces/") else destination.files
        return bytes(store.read(entry, start + at, start + at + size))

    def chunks(self) -> Iterator[bytes]:
        """Yield the file's bytes in order.

        Raises:
            VerifyFailed: a piece is not what its record says.
        """
        yield self._passed(self._around(0, self._joined.head))
        for piece in self._pieces:
            record, hasher = self._written[piece.name], xxhash.xxh3_128()
            for at in range(0, record.size, BLOCK):
                block = self._piece(piece, at, min(BLOCK, record.size - at))
                hasher.update(block)
                yield self._passed(block)
            if hasher.hexdigest() != record.xxh3:
                raise VerifyFailed(f"{piece.name}: it is not what was written; run the same command again")
        if self.tail:
            yield self._passed(self._around(self.end, self.tail))

    def _around(self, at: int, data: bytes) -> bytes:
        """Return bytes before or after the pieces: as the local file has them, else as they will be written."""
        if not self._journal.destination.assembles:
            return data
        store = self._journal.destination.files
        entry = store.find(self._joined.name)
        return data if entry is None else bytes(store.read(entry, at, at + len(data)))

    def _passed(self, data: bytes) -> bytes:
        self._whole.update(data)
        return data

    def row(self) -> WeightFile:
        """Return the file's entry for the report, after `chunks` was read to its end."""
        rows = [
            FileRange(name=piece.name, offset=start_of(piece), bytes=record.size, xxh3=record.xxh3)
            for piece in self._pieces
            for record in (self._written[piece.name],)
        ]
        if self.tail:
            digest = xxhash.xxh3_128_hexdigest(self.tail)
            rows.append(FileRange(name=f"{self._joined.name}.tail", offset=self.end, bytes=len(self.tail), xxh3=digest))
        return WeightFile(name=self._joined.name, bytes=self.size, xxh3=self._whole.hexdigest(), pieces=tuple(rows))


def _large(pieces: Sequence[OutputFile]) -> list[Range]:
    """Return where the large tensors of a joined file are; nothing where tensors of variable length move others."""
    if any(slot.is_bound for piece in pieces for slot in piece.slots):
        return []
    starts = ((start_of(piece) + piece.header_bytes + slot.offset, slot) for piece in pieces for slot in piece.slots)
    return [(start, start + slot.size) for start, slot in starts if slot.size > READ_BEFORE_PUBLISHING]


def start_of(piece: OutputFile) -> int:
    """Return where a piece begins in the joined file."""
    assert piece.within is not None
    return piece.within[1]
