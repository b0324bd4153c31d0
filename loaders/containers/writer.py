"""The writer of a planned file of any container: tensors in any order, from any threads, and then what frames them."""

from __future__ import annotations

import ctypes
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from loaders.clock import Clock
from loaders.containers.base import Container, Places
from loaders.dtypes import storage_of
from loaders.errors import StorageError, io_errors
from loaders.specs import OutputFile, Slot
from loaders.storage.atomic import allocate

WRITEBACK = 4 << 20  # bytes that are worth a call to begin to write them out
SYNC_FILE_RANGE_WRITE = 2  # Linux's fcntl.h: start writing dirty pages out, and wait for nothing
# A piece of fewer bytes waits for others, since a call for each takes longer than encoding it: until so many bytes are
# there, or so many pieces.
SMALL = 64 << 10
SMALL_BYTES = 4 << 20
SMALL_PIECES = 4096
BLOCK = 4 << 20  # bytes read at a time for a checksum, so that a tensor of any size takes little memory


class ShardWriter:
    """The writer of one planned file; `seal` completes it and makes it durable.

    The file is created at `path`, which must not exist, and its whole space is reserved at once, so that a full disk is
    noticed before any work. The caller renames the finished file. With `start`, a piece is written in place instead:
    into the existing file, from that byte on.
    """

    def __init__(
        self, path: Path, file: OutputFile, container: Container, start: int | None = None, clock: Clock | None = None
    ) -> None:
        self.path = path
        self._clock = clock or Clock()
        self.file = file
        self.start = start or 0
        self.size = 0
        self._is_in_place = start is not None
        self._container = container
        self.frame: dict[int, tuple[int, int]] = {}  # bytes and xxh3-64 of each part of the frame, by its first byte
        self._bound: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._waiting: dict[int, bytes] = {}  # small pieces by their first byte in the file
        self._waiting_bytes = 0
        self._small_bytes = 0  # of small tensors that are finished and not yet being written out
        flags = os.O_RDWR | (os.O_NOFOLLOW if self._is_in_place else os.O_CREAT | os.O_EXCL)
        with io_errors("creating", path):
            self._descriptor = os.open(path, flags, 0o666)
        if self._is_in_place:
            return
        try:
            with io_errors(f"taking {file.size} bytes for", path):
                allocate(self._descriptor, file.size)
        except BaseException:  # interrupts too: a file without its room must not stay
            self.abort()
            raise

    def write(self, slot: Slot, offset: int, data: memoryview) -> None:
        """Put bytes at `offset` of a tensor.

        Raises:
            StorageError: the disk is full, ...
        """
        assert offset + len(data) <= slot.size, f"{slot.name}: {offset} + {len(data)} exceeds {slot.size}"
        if slot.is_bound:  # its place depends on the lengths of all such tensors, so `seal` writes it
            assert offset == 0
            self._bound[slot.name] = bytes(data)
            return
        with self._clock.phase("write"):
            at = self.file.header_bytes + slot.offset + offset
            if len(data) >= SMALL:
                self._put(data, at)
                return
            with self._lock:
                self._waiting[at] = bytes(data)
                self._waiting_bytes += len(data)
                if self._waiting_bytes >= SMALL_BYTES or len(self._waiting) >= SMALL_PIECES:
                    self._put_waiting()

    def read(self, slot: Slot, offset: int, out: memoryview) -> int:
        """Read back bytes from `offset` of a tensor as the file has them; return how many there were.

        Only a tensor of bound length can have fewer than asked for.
        """
        if slot.is_bound:
            found = self._bound[slot.name][offset : offset + len(out)]
            out[: len(found)] = found
            return len(found)
        with self._lock:
            self._put_waiting()
        self._get(self.file.header_bytes + slot.offset + offset, out)
        return len(out)

    def start_syncing(self, slot: Slot) -> None:
        """Let the system begin to write a finished tensor to the disk, so that `seal` has less to wait for.

        Small tensors are written out together: a call for each would take longer than encoding them.
        """
        if slot.is_bound:
            return
        if slot.size >= WRITEBACK:
            begin_writeback(self._descriptor, self.start + self.file.header_bytes + slot.offset, slot.size)
            return
        self._small_bytes += slot.size  # threads may lose each other's sums, which only makes the next call later
        if self._small_bytes >= WRITEBACK:
            self._small_bytes = 0
            begin_writeback(self._descriptor, self.start, self.file.size)

    def seal(self) -> Places:
        """Write tensors of variable length and the frame, sync the file, and return the tensors' places.

        Raises:
            StorageError: the disk is full, ...
        """
        self._put_waiting()
        places = self._container.place(self.file, {name: len(data) for name, data in self._bound.items()})
        for name, data in self._bound.items():
            self._put(memoryview(data), places[name][0])
        end = 0
        for at, data in self._container.frame(self.file, places, self._checksum):
            self._put(memoryview(data), at)
            self.frame[at] = len(data), xxhash.xxh3_64_intdigest(data)
            end = max(end, at + len(data))
        self.size = max([end, *(at + size for at, size in places.values())])
        with io_errors("writing", self.path):
            if not self._is_in_place:
                os.ftruncate(self._descriptor, self.size)
            os.fsync(self._descriptor)
        return places

    def _checksum(self, offset: int, size: int) -> int:
        """Return the CRC-32 of bytes of the file, read back."""
        found, buffer = 0, memoryview(bytearray(min(size, BLOCK)))
        for at in range(0, size, BLOCK):
            block = buffer[: min(BLOCK, size - at)]
            self._get(offset + at, block)
            found = zlib.crc32(block, found)
        return found

    def _put_waiting(self) -> None:
        """Write the pieces that wait; those that follow one another in the file by one call."""
        runs: list[tuple[int, list[bytes]]] = []
        end = -1
        for at, data in sorted(self._waiting.items()):
            if at != end:
                runs.append((at, []))
            runs[-1][1].append(data)
            end = at + len(data)
        for at, run in runs:
            self._put(memoryview(b"".join(run)), at)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _put(self, data: memoryview, at: int) -> None:
        with io_errors("writing", self.path):
            while data:  # one call writes at most about 2 GiB on Linux
                count = os.pwrite(self._descriptor, data, self.start + at)
                at, data = at + count, data[count:]

    def _get(self, at: int, out: memoryview) -> None:
        with io_errors("reading back", self.path):
            while out:
                count = os.preadv(self._descriptor, [out], self.start + at)
                if count == 0:
                    raise StorageError(f"reading back {self.path}: it ends at byte {at}; something cut it short")
                at, out = at + count, out[count:]

    def close(self) -> None:
        """Close the file, which stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def abort(self) -> None:
        """Close and remove the file. A file that is written in place stays, since other units write it too."""
        self.close()
        if not self._is_in_place:
            # This runs because of another error, which must not be hidden; `clean` removes what is left.
            with suppress(OSError):
                self.path.unlink()


Piece = tuple[int, int]  # bytes [start, stop) of a stored tensor


class TensorSink:
    """The slots of one tensor in files being written: a `Sink` for what a scheme stores, a `Stored` to read it back.

    Everything is hashed as it is written, and `pieces` keeps the hashes, so that the finished file can be checked to
    hold exactly that. `array` gives this thread's reusable memory.
    """

    def __init__(
        self,
        writers: Mapping[str, ShardWriter],
        slots: Mapping[str, Slot],
        constants: Mapping[str, bytes],
        array: Callable[[str, int, Any], np.ndarray],
    ) -> None:
        self._writers = writers
        self._slots = slots
        self._array = array
        self.pieces: dict[str, dict[Piece, int]] = {slot.name: {} for slot in slots.values()}
        for role, data in constants.items():
            self._put(slots[role], 0, memoryview(data))

    def write(self, role: str, start: int, data: np.ndarray) -> None:
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        self._put(self._slots[role], start * data.itemsize, raw)

    def _put(self, slot: Slot, first: int, raw: memoryview) -> None:
        self.pieces[slot.name][first, first + len(raw)] = xxhash.xxh3_64_intdigest(raw)
        self._writers[slot.name].write(slot, first, raw)

    def read(self, role: str, start: int, stop: int) -> np.ndarray:
        slot = self._slots[role]
        storage = storage_of(slot.dtype)
        first, last = start * storage.itemsize, min(stop * storage.itemsize, slot.size)
        buffer = self._array(f"back {role}", last - first, np.uint8)
        return buffer[: self._writers[slot.name].read(slot, first, buffer.data)].view(storage)

    def done(self) -> None:
        """Note that the tensor is complete and measured, so that the kernel begins to write it out."""
        for slot in self._slots.values():
            self._writers[slot.name].start_syncing(slot)


def begin_writeback(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to write out a range without waiting. Only Linux can; elsewhere `fsync` does all the work.

    Otherwise dirty pages pile up until `seal`, and the job waits for the disk at the end instead of all along.
    """
    # The result is ignored: this is a hint, and `fsync` reports every error of writing.
    if (call := _sync_file_range()) is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Any:
    return getattr(ctypes.CDLL(None), "sync_file_range", None)
