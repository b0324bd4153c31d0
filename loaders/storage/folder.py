"""A local folder as a store: its files have paths, so they can be memory-mapped."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath

from loaders.errors import BadCheckpoint, StorageError, io_errors
from loaders.storage.address import Address
from loaders.storage.base import Entry, Range
from loaders.storage.times import modified

# Folders that tools make (git, the Hub's client, Python, Jupyter); they are not part of a checkpoint.
SKIPPED = (".git", ".cache", ".huggingface", "__pycache__", ".ipynb_checkpoints")
# A file that a store of contents (the Hub's cache, DVC) names by its hash, or by all but its first digits.
HASH = re.compile(r"[0-9a-f]{28,128}")

# What `absence` says of a file, in every kind of store.
A_FILE = "a file; give the folder it lies in, or a file of weights: .safetensors, .gguf, .bin, .pt or .pth"


class Folder:
    """A `Store` of the files in a local folder. A file's tag is its mtime and ctime in nanoseconds.

    Programs can set an mtime, so that a file may be replaced or written to and have the size and mtime that it had.
    The ctime is the kernel's own. It is another one in a copy, which so is another version of the file.
    """

    is_local = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def address(self) -> Address:
        return Address(str(self.path))

    def absence(self) -> str | None:
        if self.path.is_dir():
            return None
        return A_FILE if self.path.exists() else "nothing there"

    def is_taken(self) -> bool:
        return self.path.exists() or self.path.is_symlink()

    def is_link(self) -> bool:
        return self.path.is_symlink()

    def list(self, *, deep: bool = True, every: bool = False) -> tuple[Entry, ...]:
        if not self.path.is_dir():
            return ()
        return tuple(sorted(self._walk(deep, every)))

    def _walk(self, deep: bool, every: bool) -> Iterator[Entry]:
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            # It may go away meanwhile; one that cannot be read is no empty one.
            looking = io_errors("looking into", self.path / folder)
            with looking, suppress(FileNotFoundError), os.scandir(self.path / folder) as found:
                for each in found:
                    if each.name in SKIPPED and not every and each.is_dir():
                        continue
                    if each.is_dir(follow_symlinks=False):
                        waiting += [f"{folder}{each.name}/"] if deep else []
                    # What else lies beside a single file is not the model's, sockets in /tmp for instance.
                    elif deep or every or each.is_file():
                        yield from self._listed(folder + each.name, each, every)

    def _listed(self, name: str, each: os.DirEntry[str], every: bool) -> Iterator[Entry]:
        """Yield the entry of what is no folder, unless it has gone meanwhile.

        Raises:
            BadCheckpoint: it is no file, and not `every` is listed. A linked folder, which could lead out of the
                checkpoint or in a circle, has an entry, and is refused by `check_inside` where it matters.
        """
        with suppress(FileNotFoundError):
            status = _status_of(each)
            if not every and not stat.S_ISDIR(status.st_mode):
                _check_file(self.path / name, status)
            yield _entry(name, status)

    def entry_of(self, name: str) -> Entry:
        """Return the entry of a file that must exist.

        Raises:
            StorageError: it does not exist, or no longer.
        """
        with io_errors("looking at", self.path / name):
            return _entry(name, (self.path / name).stat())

    def find(self, name: str) -> Entry | None:
        """Look up a file as `Store.find`.

        Raises:
            BadCheckpoint: what has the name is neither a file nor a folder, or lies behind a linked folder.
        """
        path = self._inner(name)
        with io_errors("looking at", path):
            if "/" in name and not path.parent.resolve().is_relative_to(self.path.resolve()):
                raise BadCheckpoint(f"{name}: a linked folder leads out of {self.path}; its files are not followed")
            try:
                status = _status_of(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        if stat.S_ISDIR(status.st_mode):
            return None
        _check_file(path, status)
        return _entry(name, status)

    def _inner(self, name: str) -> Path:
        """Return the path of a name that may come from an untrusted file, such as an index.

        Raises:
            BadCheckpoint: the name leads out of the folder.
        """
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\0" in name:
            raise BadCheckpoint(f"{name!r} leads out of {self.path}; do not trust what names it")
        check_name(name)
        return self.path / name

    def check_inside(self, name: str, *, may_leave: bool = False) -> str | None:
        """Check a file as `Store.check_inside`. Links of the Hub's cache, from snapshots/ to blobs/, are inside."""
        path = self.path / name
        check_name(name)
        if path.exists() and not may(path, os.R_OK):
            raise StorageError(
                f"reading {path}: Permission denied; check who owns it, or move it out of the checkpoint"
            )
        if not path.is_symlink():
            return None
        if path.is_dir():
            raise BadCheckpoint(f"{path}: a linked folder; its files are not followed: copy it in")
        root, target = self.path.resolve(), path.resolve()
        # The folder itself may be a link to a snapshot, or a folder within one.
        caches = [above.parent for above in root.parents if above.name == "snapshots"]
        in_cache = any(target.is_relative_to((cache / "blobs").resolve()) for cache in caches)
        if in_cache or target.is_relative_to(root):
            return None
        if may_leave and (target.suffix == path.suffix or HASH.fullmatch(target.name)):
            return str(target)
        raise BadCheckpoint(f"{name}: it links to {target}, outside the checkpoint; copy it in")

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        path, data = self._inner(entry.name), memoryview(bytearray(stop - start))
        with io_errors("reading", path), path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            self._check_same(entry, status)
            at, left = start, data
            # Linux reads at most 2 GiB less a page in one call, and network filesystems less: a short read is normal.
            while left:
                count = os.preadv(file.fileno(), [left], at)
                if count == 0:
                    raise BadCheckpoint(f"{entry.name}: it ends at byte {at}, expected {stop}; fetch it again")
                at, left = at + count, left[count:]
        return data

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        return (self.read(entry, start, stop) for start, stop in ranges)

    def check_unchanged(self, entry: Entry) -> None:
        path = self.path / entry.name
        with io_errors("looking at", path):
            # This runs once a tensor, and os.stat takes a few microseconds less than Path.stat.
            self._check_same(entry, os.stat(path))  # noqa: PTH116

    def _check_same(self, entry: Entry, status: os.stat_result) -> None:
        if (status.st_size, tag_of(status)) == (entry.size, entry.tag):
            return
        what = f"{entry.size} bytes when its headers were, {status.st_size} now"
        if status.st_size == entry.size and modified(entry.tag) == status.st_mtime_ns:
            what = "its size and mtime are the same, but it was replaced, or its rights or links changed"
        raise BadCheckpoint(
            f"{entry.name}: it changed while it was read: {what}; load it again when nobody writes to it"
        )

    def local_path(self, name: str) -> Path | None:
        return self.path / name


def may(path: Path, rights: int) -> bool:
    """Whether this process has rights (os.R_OK, ...) to a path, as the user who it acts for."""
    return os.access(path, rights, effective_ids=os.access in os.supports_effective_ids)


def check_name(name: str) -> None:
    """Check that a file's name can be written down: reports, indexes and stores have UTF-8.

    Raises:
        BadCheckpoint: it cannot.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        said = name.encode(errors="backslashreplace").decode()
        raise BadCheckpoint(f"{said}: the name is no UTF-8; give the file another, or move it away") from None


def tag_of(status: os.stat_result) -> str:
    """Return the tag of a file's version."""
    return f"{status.st_mtime_ns} {status.st_ctime_ns}"


def _entry(name: str, status: os.stat_result) -> Entry:
    return Entry(name, status.st_size, tag_of(status))


def _status_of(path: Path | os.DirEntry[str]) -> os.stat_result:
    """Return the status of what a path leads to, of a link to nothing its own.

    Raises:
        OSError: nothing is there, or it cannot be seen.
    """
    try:
        return path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return path.lstat() if isinstance(path, Path) else path.stat(follow_symlinks=False)


NO_FILES = {
    stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link to a file that is not there",
}  # fmt: skip


def _check_file(path: Path, status: os.stat_result) -> None:
    """Raise BadCheckpoint unless a status is a file's. What is none hides a file that would be lost in silence."""
    if not stat.S_ISREG(status.st_mode):
        what = NO_FILES.get(stat.S_IFMT(status.st_mode), "nothing known")
        advice = "fetch it again, or remove it" if stat.S_ISLNK(status.st_mode) else "move it out of the checkpoint"
        raise BadCheckpoint(f"{path}: expected a file, found {what}; {advice}")


def folders_in(path: Path, most: int) -> list[str]:
    """List the names of the folders in a folder, sorted, at most so many; hidden ones are left out.

    Raises:
        StorageError: it cannot be listed.
    """
    if not path.is_dir():
        return []
    with io_errors("looking into", path), os.scandir(path) as found:
        names = (each.name for each in found if each.is_dir() and not each.name.startswith("."))
        return sorted(islice(names, most))
