"""Copying a file from a store into an unpublished output."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from loaders.errors import io_errors
from loaders.storage.base import Destination, Entry, PinnedFiles
from loaders.storage.hashes import BLOCK, text_digest
from loaders.storage.settings import MB, current

PLAIN = 0o666  # the rights of a file that came from a store that knows none


def copy_into(destination: Destination, files: PinnedFiles, name: str) -> None:
    """Copy a file into an output's finished files, byte for byte; from a local folder with those of its rights that the
    umask gives, and no setuid.

    On its way to a store it lies in scratch, unless it is larger than the setting `scratch_mb`: then it is streamed.

    Raises:
        BadCheckpoint: the source changed since it was pinned.
        StorageError: the source cannot be read, or the copy cannot be written.
    """
    entry = files.entry(name)
    if not destination.is_local and entry.size > current().scratch_mb * MB:
        destination.join(f"files/{name}", _blocks(files, entry), entry.size)
        return
    # The folder of scratch files has no sub-folders, and a path is longer than a name may be.
    part = destination.scratch(text_digest(name))
    source = files.store.local_path(name)
    with io_errors("copying", part):
        wanted = PLAIN if source is None else source.stat().st_mode
        # What it is made with, less the umask, is the most that it may have. The owner reads it, whatever it was.
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o777), "wb") as copy:
            for block in _blocks(files, entry):
                copy.write(block)
            copy.flush()
            os.fchmod(copy.fileno(), os.fstat(copy.fileno()).st_mode & wanted & 0o777 | stat.S_IRUSR)
            os.fsync(copy.fileno())
    destination.keep(part, f"files/{name}")


def _blocks(files: PinnedFiles, entry: Entry) -> Iterator[bytes]:
    for at in range(0, entry.size, BLOCK):
        yield bytes(files.store.read(entry, at, min(at + BLOCK, entry.size)))
