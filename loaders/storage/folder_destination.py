"""An unpublished output on a local filesystem. The journal is a hidden sibling of the output; publishing is a rename.

.NAME.KEY.weightmill/    KEY names the plan: another plan for the same output has a folder of its own
    lock                 held by the driver while it runs
    parts/               files being written, one for each attempt of a unit
    files/               finished files; this folder becomes the output. A file that several units share is here from
                         the start: they write into it in place
    pieces/ records/     see `Destination`
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from loaders.errors import BadSpec, io_errors
from loaders.storage.address import Address
from loaders.storage.atomic import TEMPORARY, allocate, exclusive, holder, is_locked, open_own, sync_folder, write_file
from loaders.storage.base import Abandoned, Entry, Range
from loaders.storage.folder import Folder, tag_of
from loaders.storage.hashes import BLOCK, hash_file
from loaders.storage.ownership import check_planted, make_own

SUFFIX = ".weightmill"
AREAS = ("files", "parts", "pieces", "records")
# All that a journal has, see jobs/output/journal.py; `replaced` is an output that was to be exchanged. That of an
# output on the Hub knows the files that left, see hub/finished.py, and the commit before.
FOLDERS = {*AREAS, "replaced", "bytes", "finished"}
FILES = {"lock", "job.json", "failed", "published.json", "quality.json", "life.json", "parent.json"}
# Arguments of renameat2(2), which Python's os module does not offer: swap the two names in one step, and take relative
# paths from the current folder.
RENAME_EXCHANGE = 2
AT_FDCWD = -100


class FolderDestination:
    """A `Destination` on a local filesystem."""

    is_local = True
    assembles = True

    def __init__(self, address: Address, key: str) -> None:
        self.address = address
        self._output = address.path
        self.root = self._output.parent / f".{self._output.name}.{key[:12]}{SUFFIX}"

    @property
    def journal(self) -> Address:
        return Address(str(self.root))

    @property
    def files(self) -> Folder:
        return Folder(self.root / "files")

    def prepare(self, *, overwrite: bool) -> None:
        make_own(self.root, AREAS)
        check_planted(self.root)
        with io_errors("making", self.root):
            # Only the driver that holds the lock comes here, so what is in parts/ is from attempts that were killed.
            for path in (self.root / "parts").iterdir():
                path.unlink()

    def is_there(self) -> bool:
        return (self.root / "parts").is_dir()

    @contextmanager
    def claim(self) -> Iterator[str | None]:
        make_own(self.root)
        with exclusive(self.root / "lock") as is_held:
            yield None if is_held else holder(self.root / "lock")

    def put(self, name: str, data: bytes) -> None:
        first, *within = PurePosixPath(name).parts
        # `clean` takes a folder with anything else in it for none of ours.
        assert first in FOLDERS if within else first in FILES or first.endswith(TEMPORARY), name
        path = self.root / name
        with io_errors("making", path.parent):
            self._make(path.parent)
        write_file(path, data)

    def _make(self, folder: Path) -> None:
        """Make a folder in the journal; not the journal, which may be gone since a job that went on is done."""
        self.root.stat()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> bytes | None:
        path = self.root / name
        if not path.is_file():
            return None
        with io_errors("reading", path):
            return path.read_bytes()

    def list(self, area: str) -> tuple[Entry, ...]:
        return Folder(self.root / area).list()

    def drop(self, name: str) -> None:
        path = self.root / name
        with io_errors("removing", path):
            path.unlink(missing_ok=True)

    def scratch(self, name: str) -> Path:
        return self.root / "parts" / name

    def keep(self, part: Path, name: str, large: Sequence[Range] = ()) -> Entry:
        target = self.root / name
        with io_errors("finishing", target):
            self._make(target.parent)
            part.replace(target)
            sync_folder(target.parent)
            status = target.stat()
        return Entry(name, status.st_size, tag_of(status))

    def shared(self, name: str, size: int | None = None) -> Path | None:
        path = self.root / name
        if size is not None:
            with io_errors(f"taking {size} bytes for", path):
                descriptor = open_own(path, os.O_RDWR)
                try:
                    allocate(descriptor, size)
                finally:
                    os.close(descriptor)
                sync_folder(path.parent)
        return path

    @property
    def pieces(self) -> Folder:
        return Folder(self.root / "pieces")

    def assemble(
        self, name: str, pieces: Sequence[tuple[int, str]], around: Sequence[tuple[int, bytes]], size: int
    ) -> None:
        target = self.root / name
        with io_errors("joining", target):
            descriptor = open_own(target, os.O_RDWR)
            try:
                for start, piece in pieces:
                    _move_in(self.root / piece, descriptor, start)
                for start, data in around:
                    _put(descriptor, memoryview(data), start)
                os.ftruncate(descriptor, size)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            sync_folder(target.parent)

    def join(self, name: str, chunks: Iterator[bytes], size: int, large: Sequence[Range] = ()) -> Entry:
        part = self.scratch(Path(name).name)
        with io_errors("writing", part), part.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return self.keep(part, name)

    def stage(self, name: str, data: bytes) -> None:
        self.put(f"files/{name}", data)

    def holds(self, written: Entry, digest: str, start: int | None = None) -> bool:
        # The size costs nothing to compare, so it goes first. An mtime does not tell whether all bytes reached the
        # disk before a power loss, so the bytes are hashed.
        path = self.root / written.name
        if not path.is_file():
            return False
        size = path.stat().st_size
        is_whole = size == written.size if start is None else size >= start + written.size
        return is_whole and hash_file(path, start=start or 0, size=written.size) == digest

    def publish(self, *, overwrite: bool) -> None:
        # Names must be durable before the rename is: else a power loss could leave an output without some of its files.
        files = self.root / "files"
        for folder in [files, *(path for path in files.rglob("*") if path.is_dir())]:
            sync_folder(folder)
        with io_errors("publishing", self._output):
            if not self._output.exists():
                files.rename(self._output)
            elif overwrite:
                _exchange(files, self._output)
            else:
                raise BadSpec(f"{self._output} came into being while the job ran")
            sync_folder(self._output.parent)

    def forget(self) -> None:
        # It is gone already, by an earlier call or by another process.
        with suppress(FileNotFoundError):
            # The newest goes last, which says how far the job had come: a kill in between must not take it away alone,
            # or a published output would look like another's.
            for path in sorted(self.root.iterdir(), key=lambda path: (path.is_file(), path.lstat().st_mtime_ns)):
                shutil.rmtree(path) if _is_folder(path) else path.unlink()
            shutil.rmtree(self.root)

    def forget_empty(self) -> None:
        # It does not exist, or something is in it.
        with suppress(OSError):
            self.root.rmdir()


def _move_in(piece: Path, descriptor: int, start: int) -> None:
    """Copy a piece into the open file at an offset, then remove it. At most one piece is on the disk twice.

    An interrupted run, or another process, may have moved it already: it is removed only after its bytes in the target
    are durable.
    """
    try:
        file = piece.open("rb", buffering=0)
    except FileNotFoundError:
        return
    buffer = memoryview(bytearray(BLOCK))
    with file:
        while count := file.readinto(buffer):
            _put(descriptor, buffer[:count], start)
            start += count
    os.fsync(descriptor)
    piece.unlink(missing_ok=True)


def _put(descriptor: int, data: memoryview, start: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, start)
        start, data = start + count, data[count:]


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders atomically where the system can, else by two renames, between which `old` is missing."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            done = libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE)
            if done == 0:
                return
            # With these codes, a kernel or filesystem says that it has no exchange; any other is a real error.
            if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    aside = new.with_name("replaced")
    if aside.exists():
        shutil.rmtree(aside)
    old.rename(aside)
    new.rename(old)


def abandoned_in(folder: Path, name: str | None = None) -> tuple[Abandoned, ...]:
    """List the journals in a folder: of all outputs there, or of the output with a name."""
    if not folder.is_dir():
        return ()
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{12}}{re.escape(SUFFIX)}")
    return tuple(left_in(p) for p in sorted(folder.iterdir()) if pattern.fullmatch(p.name) and _is_journal(p))


def _is_journal(path: Path) -> bool:
    """Whether a path that has the name of a journal is one: a folder with nothing else in it."""
    try:
        return _is_folder(path) and all(_is_of_a_journal(each) for each in path.iterdir())
    # It is another user's, or went away meanwhile.
    except OSError:
        return False


def _is_of_a_journal(path: Path) -> bool:
    is_file = stat.S_ISREG(path.lstat().st_mode)
    return (path.name in FOLDERS and _is_folder(path)) or (is_file and (path.name in FILES or path.suffix == TEMPORARY))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def left_in(path: Path) -> Abandoned:
    """Describe one journal folder, in which a job may be at work."""
    found = {each: status for each in path.rglob("*") if stat.S_ISREG((status := _status(each)).st_mode)}
    now = _time_in(path)
    return Abandoned(
        address=Address(str(path)),
        size=sum(status.st_size for status in found.values()),
        units_done=sum(each.parent.name == "records" for each in found),
        age_s=now - max((status.st_mtime for status in found.values()), default=_status(path).st_mtime),
        is_held=_is_held(path),
        ages_s={each.name: max(0.0, now - status.st_mtime) for each, status in found.items() if each.parent == path},
    )


def _time_in(folder: Path) -> float:
    """Return the time by the clock that files in a folder get theirs from: that of a server, if it is one's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as made:  # which has no name where the system can do without
            return os.fstat(made.fileno()).st_mtime
    # It may only be read.
    except OSError:
        return time.time()


def _status(path: Path) -> os.stat_result:
    """Return what stat says of a path itself; of one that cannot be seen, or went away meanwhile, zeros."""
    try:
        return path.lstat()
    except OSError:
        return os.stat_result((0,) * 10)


def _is_held(journal: Path) -> bool:
    if not os.path.lexists(journal / "lock"):
        return False
    try:
        return is_locked(journal / "lock")
    # If the lock cannot be opened, it is not known; "held" is the answer that deletes nothing.
    except OSError:
        return True


def discard_folder(path: Path) -> None:
    """Remove the journal folder of an interrupted job.

    Raises:
        StorageError: it cannot be removed.
    """
    with io_errors("removing", path):
        shutil.rmtree(path)
