"""Atomic file writes (a file appears whole or not at all), and locks that end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from loaders.errors import StorageError, io_errors

TEMPORARY = ".tmp"
LOCK_PAUSES_S = (0.01, 0.05, 0.0)  # after each attempt to take a lock


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Fsync a folder, so that renames inside it survive a power loss: fsync of the file alone does not cover them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically and durably: temporary name, fsync, rename. On any failure, an existing file stays.

    Raises:
        StorageError: the folder cannot be written, the disk is full, ...
    """
    temporary = _temporary(path)
    with io_errors("writing", path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            # The first error is the one to report; the file may not have been created.
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    """Return an unused name in the same folder, since a rename is atomic only within a filesystem.

    Processes, and threads of one, that write the same file at once do not write into one temporary file.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}{TEMPORARY}")


def allocate(descriptor: int, size: int) -> None:
    """Reserve a file's space on the disk, so that a full disk fails here; else, where unsupported, set its length."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            # Filesystems that cannot reserve space answer with these codes. Any other error, such as a full disk, is
            # a real one.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def open_own(path: Path, flags: int) -> int:
    """Open or make a file where nobody but weightmill has one; returns the descriptor.

    Raises:
        OSError: ..., or it is a link, which is not followed, or no file; what is there is not changed.
    """
    try:
        # Without O_NONBLOCK a FIFO would be waited for.
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):  # what systems say of links and such
            raise _planted(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _planted(path)
    return descriptor


def _planted(path: Path) -> OSError:
    said = "a link, or no file, where weightmill has a file of its own; remove it, or choose another path"
    return OSError(errno.EEXIST, said, os.fspath(path))


@contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Try to take a lock file without waiting; yields False if another process holds it.

    The file's text names its last holder. The lock is a flock: the kernel drops it when the process ends, however it
    ends. On a network filesystem it may exclude processes of the same host only.

    Raises:
        StorageError: it cannot be opened, or is a link, or no file.
    """
    with io_errors("locking", path):
        file = os.fdopen(open_own(path, os.O_RDWR | os.O_APPEND), "a+")
    with file:
        with io_errors("locking", path):
            # Who held it until now may have removed it, with all that it guards.
            is_held = _lock(file) and _is_at(path, file)
        yield is_held


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> bool:
    for pause_s in LOCK_PAUSES_S:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        # Another process holds it: that is an answer, not an error. Or one looks whether it is held, for a moment.
        except BlockingIOError:
            time.sleep(pause_s)
    else:
        return False
    file.truncate(0)
    file.write(f"{socket.gethostname()} pid {os.getpid()}\n")
    file.flush()
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock file, which is not changed.

    Raises:
        OSError: it cannot be opened, or is a link.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holder(path: Path) -> str:
    """Return the last holder of a lock file, "HOST pid N", for messages; "unknown" if the file does not say."""
    try:
        return path.read_text().strip() or "unknown"
    # The text only serves a message, which must not fail because the holder just removed the file.
    except OSError:
        return "unknown"


class AtomicWriter:
    """A context manager that replaces a file atomically: `with AtomicWriter(filepath) as file`.

    An existing file stays until the block ends without an error, and after a crash. File and folder are synced. The
    mode bits are those of the existing file, else 0o666 less the umask. A symbolic link stays: the file that it points
    to is replaced. `mode` is "wb", or "w" for text, whose `encoding` is utf-8 by default.

    Raises:
        ValueError: another mode, or an encoding for bytes.
        StorageError: the folder cannot be written, the disk is full, ...; the existing file is unchanged.
    """

    def __init__(self, filepath: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> None:
        if mode not in ("w", "wb", "wt"):
            raise ValueError(f"mode: expected 'wb' or 'w', found {mode!r}: a file that appears whole is written anew")
        if "b" in mode and encoding is not None:
            raise ValueError(f"encoding: {encoding!r} is for text; give mode='w'")
        self.path = Path(filepath)
        self._target = Path(os.path.realpath(self.path))
        self._temporary = _temporary(self._target)
        self._mode = "wb" if "b" in mode else "w"
        self._encoding = None if "b" in mode else encoding or "utf-8"
        self._file: IO[Any] | None = None

    def __enter__(self) -> IO[Any]:
        with io_errors("writing", self.path):
            if self._target.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder", str(self._target))
            # tempfile's files have mode 0o600 and would keep it after the rename; here the kernel applies the umask.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(self._temporary, flags, 0o666)
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
                # A new file has no mode to take over.
                with suppress(FileNotFoundError):
                    os.fchmod(self._file.fileno(), stat.S_IMODE(self._target.stat().st_mode))
                os.fsync(self._file.fileno())
                self._file.close()
                self._temporary.replace(self._target)
                sync_folder(self._target.parent)
        finally:
            # Closing flushes once more, and on a full disk fails once more; that error is raised already.
            with suppress(OSError):
                self._file.close()
            # After a successful rename the temporary file is gone.
            with suppress(OSError):
                self._temporary.unlink()


@contextmanager
def atomic_writer(filepath: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """Replace a file atomically, as `AtomicWriter`; OSErrors inside the block become StorageErrors with the path.

    Raises:
        As AtomicWriter, and whatever the block raises; the new file is removed first.
    """
    with AtomicWriter(filepath, mode, encoding) as file, io_errors("writing", filepath):
        yield file


def get_file_lock_path(
    model_name_or_path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Return the path of the lock of a file, a folder or a model by its name.

    Without a `cache_dir` it is a hidden file in the same folder, or one in the temporary folder if that folder is
    read-only or not there; all spellings of a path have the same lock, symbolic links included. With one it is a file
    there, named by the name or path as it is given, so that all machines that share the folder have the same lock.
    """
    if cache_dir is not None:
        name = os.fspath(model_name_or_path)
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        # The end of a path tells most; a name may be longer than a filesystem takes.
        return Path(cache_dir) / f"{digest}-{name.replace(os.sep, '-')[-100:]}.lock"
    real = Path(os.path.realpath(model_name_or_path))
    if os.access(real.parent, os.W_OK):
        return real.with_name(f".{real.name}.lock")
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"weightmill-{digest}.lock"


@contextmanager
def file_lock(path: str | os.PathLike[str], timeout_s: float | None = None) -> Iterator[Path]:
    """Hold the lock of a file or folder, waiting while another process or thread holds it; yields the lock's path.

    The kernel drops the lock when the process ends, however it ends.

    Raises:
        StorageError: the lock was not free within `timeout_s` seconds (None waits for ever), or cannot be created.
    """
    import filelock  # only writers lock, and neither a plan nor a help page writes

    place = get_file_lock_path(path)
    lock = filelock.FileLock(place, timeout=-1 if timeout_s is None else timeout_s)
    with io_errors("locking", place):
        try:
            lock.acquire()
        # It is an OSError too; `io_errors` would give it a message that says less.
        except filelock.Timeout:
            raise StorageError(
                f"{os.fspath(path)}: another process holds its lock {place} for more than {timeout_s:g} s; wait for it"
                " to end, or give more time"
            ) from None
    try:
        yield place
    finally:
        lock.release()
