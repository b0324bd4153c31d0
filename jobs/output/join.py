"""Joining: what units have left of a file that several of them write becomes that file.

Pieces that were written in place are there already. Those that were made apart, by several processes, are put in their
places one by one, each removed once its bytes are durable in the file: the disk holds one piece twice, never all. Then
the file is read from end to end: every piece must be what its record says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import xxhash

from jobs.output.journal import Journal, Record
from jobs.output.report import FileRange, WeightFile
from loaders.errors import VerifyFailed, io_errors
from loaders.layouts.base import Joined
from loaders.specs import OutputFile
from loaders.storage.atomic import sync_folder
from loaders.storage.hashes import BLOCK


def join(joined: Joined, pieces: Sequence[OutputFile], journal: Journal, records: Sequence[Record]) -> WeightFile:
    """Make the file whole among the finished ones; as the report has it.

    Raises:
        VerifyFailed: a piece is not what its record says.
        StorageError: the disk is full, ...
    """
    target, written = journal.files / joined.name, {file.name: file for r in records for file in r.files}
    with io_errors("joining", target):
        with os.fdopen(os.open(target, os.O_CREAT | os.O_RDWR, 0o666), "r+b", buffering=0) as file:
            for piece in pieces:
                _put(journal.place(piece), file, _start(piece))
            file.seek(0)
            _write(file, memoryview(joined.head))
            end = _start(pieces[-1]) + written[pieces[-1].name].size
            tail = b"" if joined.tail is None else joined.tail.made(lambda at, size: os.pread(file.fileno(), size, at))
            file.seek(end)
            _write(file, memoryview(tail))
            size = end + len(tail)
            file.truncate(size)
            os.fsync(file.fileno())
            whole, rows = xxhash.xxh3_128(), []
            file.seek(0)
            whole.update(file.read(len(joined.head)))
            for piece in pieces:
                record = written[piece.name]
                if _hash(file, record.size, whole) != record.xxh3:
                    raise VerifyFailed(f"{piece.name}: it is not what was written; run the same command again")
                rows.append(FileRange(name=piece.name, offset=_start(piece), bytes=record.size, xxh3=record.xxh3))
            found = file.read(len(tail))
            whole.update(found)
            if tail:
                digest = xxhash.xxh3_128_hexdigest(found)
                rows.append(FileRange(name=f"{joined.name}.tail", offset=end, bytes=len(tail), xxh3=digest))
        sync_folder(target.parent)
    return WeightFile(name=joined.name, bytes=size, xxh3=whole.hexdigest(), pieces=tuple(rows))


def _start(piece: OutputFile) -> int:
    assert piece.within is not None
    return piece.within[1]


def _put(path: Path, file: IO[bytes], start: int) -> None:
    """A piece that was made apart, put in its place."""
    if not path.exists():
        return
    buffer = memoryview(bytearray(BLOCK))
    file.seek(start)
    with path.open("rb", buffering=0) as piece:
        while count := piece.readinto(buffer):
            _write(file, buffer[:count])
    os.fsync(file.fileno())
    path.unlink()


def _write(file: IO[bytes], data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _hash(file: IO[bytes], size: int, whole: xxhash.xxh3_128) -> str:
    """The xxh3-128 of the next `size` bytes, which go into `whole` too."""
    hasher, left = xxhash.xxh3_128(), size
    while data := file.read(min(BLOCK, left)):
        hasher.update(data)
        whole.update(data)
        left -= len(data)
    return hasher.hexdigest()
