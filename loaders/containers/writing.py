"""Writing a planned file, of whatever container: room first, tensors in any order, what is known last at the end."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loaders.errors import StorageError, io_errors
from loaders.specs import DType, OutputFile, Slot

SYNC_FILE_RANGE_WRITE = 2
Tensors = dict[str, tuple[DType, tuple[int, ...], int]]  # by name: dtype, shape, offset among the data
MakeHead = Callable[[OutputFile, Tensors], bytes]


class ShardWriter:
    """Writes one planned file, in any order, from any threads; `finish` makes it whole, durable and known.

    The file is made new at `path`, which must not exist, with all its room taken at once: a disk that is too full says
    so before any work. Whoever owns the path renames it when it is finished.
    """

    def __init__(self, path: Path, file: OutputFile, make_head: MakeHead) -> None:
        self.path = path
        self.file = file
        self.size = file.size  # known for certain once sealed
        self._make_head = make_head
        self._bound: dict[str, bytes] = {}
        with io_errors("creating", path):
            self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            with io_errors(f"taking {file.size} bytes for", path):
                allocate(self._descriptor, file.size)
        except BaseException:
            self.abort()
            raise

    def write(self, slot: Slot, offset: int, data: memoryview) -> None:
        """Put bytes at `offset` of a tensor.

        Raises:
            StorageError: the disk is full, ...
        """
        assert offset + len(data) <= slot.size, f"{slot.name}: {offset} + {len(data)} exceeds {slot.size}"
        if slot.is_bound:
            assert offset == 0
            self._bound[slot.name] = bytes(data)
            return
        at = self.file.header_bytes + slot.offset + offset
        with io_errors("writing", self.path):
            while data:
                count = os.pwrite(self._descriptor, data, at)
                at, data = at + count, data[count:]

    def read(self, slot: Slot, offset: int, out: memoryview) -> int:
        """Read back bytes from `offset` of a tensor as the file has them; how many there were."""
        if slot.is_bound:
            found = self._bound[slot.name][offset : offset + len(out)]
            out[: len(found)] = found
            return len(found)
        at, left = self.file.header_bytes + slot.offset + offset, out
        with io_errors("reading back", self.path):
            while left:
                count = os.preadv(self._descriptor, [left], at)
                if count == 0:
                    raise StorageError(f"reading back {self.path}: it ends at byte {at}; something cut it short")
                at, left = at + count, left[count:]
        return len(out)

    def start_syncing(self, slot: Slot) -> None:
        """Let the system begin to put a finished tensor on the disk, so that `seal` has less to wait for."""
        if not slot.is_bound:
            begin_writeback(self._descriptor, self.file.header_bytes + slot.offset, slot.size)

    def seal(self) -> dict[str, int]:
        """Write what comes last, tensors of bound length and the header, durably. Gives every tensor's bytes."""
        sizes, end = {}, 0
        entries: Tensors = {}
        for slot in self.file.slots:
            size, shape, offset = slot.size, slot.shape, slot.offset
            if slot.is_bound:
                data, offset = self._bound[slot.name], end
                size, shape = len(data), (len(data) // slot.dtype.item_bytes,)
                self._put(data, self.file.header_bytes + offset)
            entries[slot.name] = (slot.dtype, shape, offset)
            sizes[slot.name] = size
            end = offset + size
        if not any(slot.is_bound for slot in self.file.slots):
            end = self.file.data_bytes  # with what aligns the next file's
        head = self._make_head(self.file, entries) if self.file.head is None else self.file.head
        assert len(head) == self.file.header_bytes, (len(head), self.file.header_bytes)
        self._put(head, 0)
        self.size = self.file.header_bytes + end
        with io_errors("writing", self.path):
            os.ftruncate(self._descriptor, self.size)
            os.fsync(self._descriptor)
        return sizes

    def _put(self, data: bytes, at: int) -> None:
        left = memoryview(data)
        with io_errors("writing", self.path):
            while left:
                count = os.pwrite(self._descriptor, left, at)
                at, left = at + count, left[count:]

    def close(self) -> None:
        """Let go of the file; it stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def abort(self) -> None:
        """Remove the file."""
        self.close()
        with suppress(OSError):
            self.path.unlink()


def begin_writeback(descriptor: int, offset: int, size: int) -> None:
    """Ask for a range to be written out, without waiting; where the system cannot, `fsync` does it all."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sync_file_range"):
        libc.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)


def allocate(descriptor: int, size: int) -> None:
    """Take a file's room where the filesystem can; else only set its length."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)
