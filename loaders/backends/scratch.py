"""Memory that threads use again and again, since a fresh large array costs several times its use."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np


class Scratch:
    """Named buffers of each thread, which grow to the largest size asked for and are freed with the thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def array(self, name: str, count: int, dtype: Any) -> np.ndarray:
        """Return an uninitialized array (count,); asking for the name again gives the same memory again."""
        buffers: dict[str, np.ndarray] = self._local.__dict__.setdefault("buffers", {})
        size = count * np.dtype(dtype).itemsize
        buffer = buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = buffers[name] = np.empty(max(size, 4096), np.uint8)
        return buffer[:size].view(dtype)
