"""Memory for tensors on their way, used again: a fresh large array costs several times what reading into it does.

A buffer is lent as an array. When the last array and tensor that lies in it is gone, it may be lent again; nobody has
to give anything back, and what a caller keeps is never overwritten.
"""

from __future__ import annotations

import errno
import mmap
from collections import deque
from typing import Any

import numpy as np

LARGE = 1 << 20
WASTE = 1.5  # a buffer is lent for a size down to its own divided by this


def fresh(size: int) -> np.ndarray:
    """A new uint8 array (size,), writable.

    Large ones are maps of their own: numpy would ask for huge pages, and where the machine's memory is fragmented the
    kernel then moves other pages out of the way first. Read into, such memory took 0.15 to 5 GB/s; this, 0.7 to 1.7.

    Raises:
        MemoryError: there is no more.
    """
    if size < LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.empty(size, np.uint8)
    try:
        return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"{size} bytes for a tensor") from error
        raise


class Buffers:
    """Lends arrays, and keeps at most `keep_bytes` of memory for the next ones."""

    def __init__(self, keep_bytes: int) -> None:
        self.keep_bytes = keep_bytes
        self._back: deque[np.ndarray] = deque()  # appended by whatever thread drops the last array: atomic, no lock
        self._free: list[np.ndarray] = []

    def take(self, size: int, *, room: int | None = None) -> np.ndarray:
        """An uninitialized uint8 array (size,), the caller's until it is dropped.

        `room`: bytes of buffers that may stay free beside it.
        """
        while self._back:
            self._free.append(self._back.popleft())
        fitting = [memory for memory in self._free if size <= memory.size <= max(size * WASTE, size + 4096)]
        memory = min(fitting, key=lambda m: m.size, default=None)
        if memory is not None:
            self._free = [other for other in self._free if other is not memory]
        limit = self.keep_bytes if room is None else min(room, self.keep_bytes)
        while self._free and sum(m.size for m in self._free) > limit:
            self._free.pop(0)
        if memory is None:
            memory = fresh(max(size, 1))
        return np.asarray(_Loan(memory, self._back))[:size]


class _Loan:
    """A buffer that goes back when the last array over it does: numpy's and torch's keep what they were made of."""

    def __init__(self, memory: np.ndarray, back: deque[np.ndarray]) -> None:
        self._memory = memory
        self._home = back

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._memory.__array_interface__

    def __del__(self) -> None:
        self._home.append(self._memory)
