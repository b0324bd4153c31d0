"""Copying a file from a store into an unpublished output."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from loaders.errors import io_errors
from loaders.storage.base import Destination, Entry, PinnedFiles
from loaders.storage.hashes import BLOCK
from loaders.storage.settings import MB, current


def copy_into(destination: Destination, files: PinnedFiles, name: str) -> None:
    """Copy a file into an output's finished files, byte for byte; from a local folder to another, with its mode bits.

    On its way to a store it lies in scratch, unless it is larger than the setting `scratch_mb`: then it is streamed.

    Raises:
        BadCheckpoint: the source changed since it was pinned.
        StorageError: the source cannot be read, or the copy cannot be written.
    """
    entry = files.entry(name)
    if not destination.is_local and entry.size > current().scratch_mb * MB:
        destination.join(f"files/{name}", _blocks(files, entry), entry.size)
        return
    # The folder of scratch files has no sub-folders.
    part = destination.scratch(name.replace("/", "%"))
    with io_errors("copying", part), part.open("xb") as copy:
        for block in _blocks(files, entry):
            copy.write(block)
        copy.flush()
        os.fsync(copy.fileno())
    source = files.store.local_path(name)
    if source is not None:
        with io_errors("copying", part):
            shutil.copymode(source, part)
    destination.keep(part, f"files/{name}")


def _blocks(files: PinnedFiles, entry: Entry) -> Iterator[bytes]:
    for at in range(0, entry.size, BLOCK):
        yield bytes(files.store.read(entry, at, min(at + BLOCK, entry.size)))
