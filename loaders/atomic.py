"""Files that appear whole or not at all, and a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from loaders.errors import io_errors


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file durably: temporary name, fsync, rename. An existing file stays as it was on any failure.

    Raises:
        StorageError: the folder cannot be written, the disk is full, ...
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with io_errors("writing", path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Try to hold a lock file; gives False when another process holds it. The file names its last holder.

    A flock: it goes with its process, however that ends. On a network filesystem it may hold on one host only.
    """
    with io_errors("locking", path):
        file = path.open("a+")
    with file:
        with io_errors("locking", path):
            is_held = _lock(file)
        yield is_held


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    file.truncate(0)
    file.write(f"{socket.gethostname()} pid {os.getpid()}\n")
    file.flush()
    return True


def holder(path: Path) -> str:
    """Who last took a lock: "host pid N"."""
    try:
        return path.read_text().strip() or "unknown"
    except OSError:
        return "unknown"
