"""A local folder as a store: its files have paths, so they can be memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from loaders.errors import BadCheckpoint, StorageError, io_errors
from loaders.storage.address import Address
from loaders.storage.base import Entry, Range

# Folders that tools make (git, the Hub's client, Python, Jupyter); they are not part of a checkpoint.
SKIPPED = (".git", ".cache", ".huggingface", "__pycache__", ".ipynb_checkpoints")


# What `absence` says of a file, in every kind of store.
A_FILE = "a file; give the folder it lies in, or a file of weights: .safetensors, .gguf, .bin, .pt or .pth"


class Folder:
    """A `Store` of the files in a local folder. A file's tag is its mtime in nanoseconds."""

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
        with io_errors("looking into", self.path):
            if deep:
                return tuple(self._entry(name) for name in sorted(self._walk(every)))
            return tuple(
                self._entry(e.name) for e in sorted(os.scandir(self.path), key=lambda e: e.name) if e.is_file()
            )

    def _walk(self, every: bool) -> Iterator[str]:
        for folder, folders, names in os.walk(self.path, onerror=_refuse):
            if not every:
                folders[:] = [name for name in folders if name not in SKIPPED]
            # os.walk does not follow linked folders, which could lead out of the checkpoint or in a circle. They are
            # listed as entries, so that `check_inside` refuses them instead of their files being lost in silence.
            links = [name for name in folders if (Path(folder) / name).is_symlink()]
            for path in (Path(folder) / name for name in (*names, *links)):
                if every or path.is_file() or path.name in links:
                    yield path.relative_to(self.path).as_posix()

    def _entry(self, name: str) -> Entry:
        path = self.path / name
        # A dangling link has no status but its own.
        status = path.stat() if path.exists() else path.lstat()
        return Entry(name, status.st_size, str(status.st_mtime_ns))

    def entry_of(self, name: str) -> Entry:
        """Return the entry of a file that must exist.

        Raises:
            StorageError: it does not exist, or no longer.
        """
        with io_errors("looking at", self.path / name):
            status = (self.path / name).stat()
        return Entry(name, status.st_size, str(status.st_mtime_ns))

    def find(self, name: str) -> Entry | None:
        path = self._inner(name)
        with io_errors("looking at", path):
            return self._entry(name) if path.is_file() else None

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

    def check_inside(self, name: str) -> None:
        """Check a file as `Store.check_inside`. Links of the Hub's cache, from snapshots/ to blobs/, are accepted."""
        path = self.path / name
        check_name(name)
        if path.exists() and not may(path, os.R_OK):
            raise StorageError(
                f"reading {path}: Permission denied; check who owns it, or move it out of the checkpoint"
            )
        if not path.is_symlink():
            return
        if path.is_dir():
            raise BadCheckpoint(f"{path}: a linked folder; its files are not followed: copy it in")
        root, target = self.path.resolve(), path.resolve()
        # The folder itself may be a link to a snapshot, or a folder within one.
        caches = [above.parent for above in root.parents if above.name == "snapshots"]
        in_cache = any(target.is_relative_to((cache / "blobs").resolve()) for cache in caches)
        if not in_cache and not target.is_relative_to(root):
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
        if (status.st_size, str(status.st_mtime_ns)) != (entry.size, entry.tag):
            raise BadCheckpoint(
                f"{entry.name}: it changed while it was read: {entry.size} bytes when its headers were,"
                f" {status.st_size} now; load it again when nobody writes to it"
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


def _refuse(error: OSError) -> None:
    """A folder that cannot be read is no empty one."""
    if isinstance(error, FileNotFoundError):  # it went away meanwhile
        return
    with io_errors("looking into", error.filename):
        raise error
