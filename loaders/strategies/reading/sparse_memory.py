"""Memory for a long run of bytes, of which only some are there at a time: in anonymous memory, or in a scratch file."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from loaders.errors import io_errors
from loaders.storage.atomic import allocate
from loaders.strategies.lazy import NO_RESERVE

# Bytes at whose multiples, from the start of the memory, a part should begin that is dropped by itself: those of a huge
# page, since dropping less than a page frees nothing, and the kernel gives out huge ones.
PAGE = 2 << 20
DROP = getattr(mmap, "MADV_DONTNEED" if sys.platform.startswith("linux") else "MADV_FREE", None)


class SparseMemory:
    """Anonymous memory of a size. It takes memory where something was put, until that part is dropped."""

    def __init__(self, size: int) -> None:
        try:
            self._map = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        except OSError as error:
            raise MemoryError(f"{size} bytes of address space") from error
        whole = np.frombuffer(self._map, np.uint8)
        self._first = -whole.ctypes.data % PAGE
        self.array = whole[self._first : self._first + size]
        if hasattr(mmap, "MADV_HUGEPAGE") and size >= PAGE:
            with suppress(OSError):  # a kernel built without them
                self._map.madvise(mmap.MADV_HUGEPAGE)

    def put(self, at: int, data: memoryview) -> None:
        self.array[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def drop(self, start: int, stop: int) -> None:
        """Free the memory of bytes [start, stop); `start` is a multiple of PAGE, and `stop` is one or the end."""
        if DROP is not None:
            with suppress(OSError):  # it is freed with the whole
                self._map.madvise(DROP, self._first + start, stop - start)


class ScratchMemory:
    """The map of a scratch file of a size in a folder. The file has no name, so it is gone whenever the process is.

    Raises:
        StorageError: the folder has no room for it.
    """

    def __init__(self, size: int, folder: str | None) -> None:
        self._folder = Path(folder or tempfile.gettempdir())
        with io_errors("writing scratch in", self._folder):
            self._file, path = tempfile.mkstemp(dir=self._folder, prefix="weightmill-")
            # By a finalizer, so that no thread still writes to what may be another file's number by then.
            weakref.finalize(self, os.close, self._file)
            Path(path).unlink()
            allocate(self._file, size)
            self.array = np.frombuffer(mmap.mmap(self._file, size), np.uint8)

    def put(self, at: int, data: memoryview) -> None:
        with io_errors("writing scratch in", self._folder):
            while data:
                count = os.pwrite(self._file, data, at)
                at, data = at + count, data[count:]

    def drop(self, start: int, stop: int) -> None:
        """Do nothing: the file is freed with the last reference to the memory."""
