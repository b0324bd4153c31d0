"""Copying a file from a store into an unpublished output."""

from __future__ import annotations

import os
import shutil

from loaders.errors import io_errors
from loaders.storage.base import Destination, PinnedFiles
from loaders.storage.hashes import BLOCK


def copy_into(destination: Destination, files: PinnedFiles, name: str) -> None:
    """Copy a file into an output's finished files, byte for byte; from a local folder, with its mode bits.

    Raises:
        BadCheckpoint: the source changed since it was pinned.
        StorageError: the source cannot be read, or the copy cannot be written.
    """
    entry = files.entry(name)
    # The folder of scratch files has no sub-folders.
    part = destination.scratch(name.replace("/", "%"))
    with io_errors("copying", part), part.open("xb") as copy:
        for at in range(0, entry.size, BLOCK):
            copy.write(files.store.read(entry, at, min(at + BLOCK, entry.size)))
        copy.flush()
        os.fsync(copy.fileno())
    source = files.store.local_path(name)
    if source is not None:
        with io_errors("copying", part):
            shutil.copymode(source, part)
    destination.keep(part, f"files/{name}")
