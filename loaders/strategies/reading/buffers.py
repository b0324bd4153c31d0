"""Reused memory for tensors that are being read, since a fresh large array costs several times what the read costs.

A buffer is lent as an array. When the last array or tensor over it is gone, it can be lent again: nobody has to give
anything back, and what a caller keeps is never overwritten.
"""

from __future__ import annotations

import errno
import mmap
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np

LARGE = 1 << 20  # bytes from which on `fresh` maps memory itself: below, numpy's allocator is fast
WASTE = 1.5  # a buffer is lent for sizes down to its own divided by this: more reuse, or less memory unused


def fresh(size: int) -> np.ndarray:
    """Return a new uint8 array (size,), writable.

    Large ones are anonymous maps of their own, which go back to the system when they are freed. They ask for huge
    pages: with small ones, the kernel's work for each page takes longer than reading into it. Maps made one after
    another lie side by side and share huge pages, so it is best to make all before the first is written to.

    Raises:
        MemoryError: there is no more memory.
    """
    if size < LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.empty(size, np.uint8)
    try:
        made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"{size} bytes for a tensor") from error
        raise
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            made.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(made, np.uint8)


class Buffers:
    """A lender of arrays, which keeps at most `keep_bytes` of unused memory for the next ones."""

    def __init__(self, keep_bytes: int) -> None:
        self.keep_bytes = keep_bytes
        # Any thread may drop the last array over a buffer, also inside the garbage collector, where a lock could be
        # held already; appending to a deque is atomic.
        self._back: deque[np.ndarray] = deque()
        self._free: list[np.ndarray] = []

    def take(self, size: int, *, room: int | None = None) -> np.ndarray:
        """Lend an uninitialized uint8 array (size,), which is the caller's until it drops it.

        At most `room` bytes of other buffers are kept unused.
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
    """A buffer that goes back when the last array over it is freed: arrays keep alive what they are made from."""

    def __init__(self, memory: np.ndarray, back: deque[np.ndarray]) -> None:
        self._memory = memory
        self._home = back

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._memory.__array_interface__

    def __del__(self) -> None:
        self._home.append(self._memory)
