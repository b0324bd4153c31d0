"""Files that appear whole or not at all, and a lock that dies with its holder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import filelock

from loaders.errors import StorageError, io_errors


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


def allocate(descriptor: int, size: int) -> None:
    """Reserve a file's room on the disk; where the filesystem cannot, only set its length."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            # The codes by which filesystems say that they cannot reserve; any other, such as a full disk, is an error.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


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


class AtomicWriter:
    """A file that appears whole, with all that was written to it, or not at all: `with AtomicWriter(path) as file`.

    What was at the path stays until the block ends without an error; a crash leaves it, too. File and folder are
    synced. The mode bits are those of the file that was there, else what the process's umask leaves of rw for all. A
    link stays a link: the file that it leads to is replaced. `mode`: "wb", or "w" for text, whose `encoding` is utf-8.

    Raises:
        ValueError: another mode.
        StorageError: the folder cannot be written, the disk is full, ...; what was there is as it was.
    """

    def __init__(self, path: str | os.PathLike[str], mode: str = "wb", *, encoding: str | None = None) -> None:
        if mode not in ("w", "wb", "wt"):
            raise ValueError(f"mode: expected 'wb' or 'w', found {mode!r}: a file that appears whole is written anew")
        if "b" in mode and encoding is not None:
            raise ValueError(f"encoding: {encoding!r} is for text; give mode='w'")
        self.path = Path(path)
        self._target = Path(os.path.realpath(self.path))
        self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
        self._mode = "wb" if "b" in mode else "w"
        self._encoding = None if "b" in mode else encoding or "utf-8"
        self._file: IO[Any] | None = None

    def __enter__(self) -> IO[Any]:
        with io_errors("writing", self.path):
            if self._target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder", str(self._target))
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(self._temporary, flags, 0o666)  # less the umask
            self._file = os.fdopen(descriptor, self._mode, encoding=self._encoding, newline=None)
        return self._file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if error is not None:
                return
            with io_errors("writing", self.path):
                self._file.flush()
                with suppress(FileNotFoundError):
                    os.fchmod(self._file.fileno(), stat.S_IMODE(self._target.stat().st_mode))
                os.fsync(self._file.fileno())
                self._file.close()
                self._temporary.replace(self._target)
                sync_folder(self._target.parent)
        finally:
            with suppress(OSError):  # of a full disk, whose error is told already
                self._file.close()
            with suppress(OSError):
                self._temporary.unlink()


@contextmanager
def atomic_writer(path: str | os.PathLike[str], mode: str = "wb", *, encoding: str | None = None) -> Iterator[IO[Any]]:
    """Write a file that appears whole or not at all: an `AtomicWriter` whose block's own OSErrors say where.

    Raises:
        As AtomicWriter; what is raised inside the block, after the new file is gone.
    """
    with AtomicWriter(path, mode, encoding=encoding) as file, io_errors("writing", path):
        yield file


def get_file_lock_path(path: str | os.PathLike[str]) -> Path:
    """Where the lock of a file or folder lies: beside it, hidden; in the temporary folder where that is read-only.

    The same for every way of writing the path, links included.
    """
    real = Path(os.path.realpath(path))
    if os.access(real.parent, os.W_OK):
        return real.with_name(f".{real.name}.lock")
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"weightmill-{digest}.lock"


@contextmanager
def file_lock(path: str | os.PathLike[str], timeout_s: float | None = None) -> Iterator[Path]:
    """Hold a file's or folder's lock, waiting for other processes and threads that hold it; gives the lock's path.

    It goes with its process, however that ends.

    Raises:
        StorageError: nobody let go of it for `timeout_s` seconds (None: wait), or it cannot be made.
    """
    place = get_file_lock_path(path)
    lock = filelock.FileLock(place, timeout=-1 if timeout_s is None else timeout_s)
    with io_errors("locking", place):
        try:
            lock.acquire()
        except filelock.Timeout:  # an OSError, too
            raise StorageError(
                f"{os.fspath(path)}: another process holds its lock {place} for more than {timeout_s:g} s; wait for it"
                " to end, or give more time"
            ) from None
    try:
        yield place
    finally:
        lock.release()
