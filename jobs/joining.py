"""Joining: the pieces that units have left become the one file that a container wants.

The pieces stay until the output is published, so that an interrupted job joins again and encodes nothing twice; the
join needs as much room again as the pieces take.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import xxhash

from jobs.journal import Journal, Record
from loaders.atomic import sync_folder
from loaders.errors import VerifyFailed, io_errors
from loaders.integrity import BLOCK
from loaders.layouts.base import Joined


def join(joined: Joined, journal: Journal, records: Sequence[Record]) -> dict[str, Any]:
    """Write the file and move it among the finished ones; its row in the report.

    Raises:
        VerifyFailed: a piece is not what its record says.
        StorageError: the disk is full, ...
    """
    by_piece = {record.file: record for record in records if record.file is not None}
    part, target = journal.parts / f"join.{os.getpid()}", journal.files / joined.name
    whole, rows, buffer = xxhash.xxh3_128(joined.head), [], memoryview(bytearray(BLOCK))
    with io_errors("joining", target):
        with part.open("wb") as file:
            file.write(joined.head)
            for name in joined.pieces:
                record, hasher, start = by_piece[name], xxhash.xxh3_128(), file.tell()
                with (journal.pieces / name).open("rb", buffering=0) as piece:
                    while count := piece.readinto(buffer):
                        file.write(buffer[:count])
                        hasher.update(buffer[:count])
                        whole.update(buffer[:count])
                if hasher.hexdigest() != record.xxh3 or file.tell() - start != record.size:
                    raise VerifyFailed(f"{name}: it is not what was written; run the same command again")
                rows.append({"name": name, "offset": start, "bytes": record.size, "xxh3": record.xxh3})
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        part.replace(target)
        sync_folder(target.parent)
    return {"name": joined.name, "bytes": size, "xxh3": whole.hexdigest(), "pieces": rows}
