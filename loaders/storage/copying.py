"""Copying a file from a store to an output under way."""

from __future__ import annotations

import os
import shutil

from loaders.errors import io_errors
from loaders.storage.base import Destination, PinnedFiles
from loaders.storage.hashes import BLOCK


def copy_into(destination: Destination, files: PinnedFiles, name: str) -> None:
    """Copy a file among an output's finished ones, byte for byte, with its mode where both have one.

    Raises:
        BadCheckpoint: the source is shorter than it was, or changed.
        StorageError: it cannot be read, or the copy not be written.
    """
    entry = files.entry(name)
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
