"""Copying to a device through pinned memory, from which its copy engine reads while the CPU fills the next buffer.

Without it, torch copies pageable memory through a small buffer of the driver's, one piece after another. For the CPU as
the device, the same code copies through plain buffers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np

from loaders.backends.devices import torch_device

PART = 16 << 20  # bytes of a buffer: long enough for the link's full rate
BUFFERS = 3  # one that the device reads, one that the CPU fills, one in between
PER_THREAD = 4 << 20  # bytes that a thread copies into a buffer at a time


class Staging:
    """Copies to one device. It holds BUFFERS * `part` bytes of pinned memory, and threads, until it is closed."""

    def __init__(self, device: str, threads: int, part: int = PART) -> None:
        self._torch, self._target = torch_device(device)
        self._is_cuda = self._target.type == "cuda"
        self._part = part
        self._buffers = [
            self._torch.empty(part, dtype=self._torch.uint8, pin_memory=self._is_cuda) for _ in range(BUFFERS)
        ]
        self._stream = self._torch.cuda.Stream(self._target) if self._is_cuda else None
        self._taken: list[Any] = [None] * BUFFERS  # events: the device has read what lay in the buffer
        self._next = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="staging")

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *of_an_error: object) -> None:
        if self._stream is not None:
            self._stream.synchronize()  # the buffers are freed next, and must not be read any more
        self._pool.shutdown()
        self._buffers.clear()

    def copied(self, raw: np.ndarray) -> Any:
        """Return a uint8 tensor (size,) on the device with the bytes of `raw`, which may be let go at once.

        On the device it is ready for whatever follows on the current stream.
        """
        out = self._torch.empty(raw.size, dtype=self._torch.uint8, device=self._target)
        if self._stream is not None:
            # The allocator may give memory that kernels queued before still use.
            self._stream.wait_stream(self._torch.cuda.current_stream(self._target))
            out.record_stream(self._stream)
        for at in range(0, raw.size, self._part):
            piece = raw[at : at + self._part]
            self._send(self._filled(piece), out[at : at + piece.size])
        if self._stream is not None:
            self._torch.cuda.current_stream(self._target).wait_stream(self._stream)
        return out

    def _filled(self, piece: np.ndarray) -> Any:
        """Copy bytes into the next buffer, once the device has read what lies in it."""
        if (event := self._taken[self._next]) is not None:
            event.synchronize()
        buffer = self._buffers[self._next][: piece.size]
        into = buffer.numpy()
        starts = range(0, piece.size, PER_THREAD)
        list(self._pool.map(lambda at: np.copyto(into[at : at + PER_THREAD], piece[at : at + PER_THREAD]), starts))
        return buffer

    def _send(self, buffer: Any, out: Any) -> None:
        with nullcontext() if self._stream is None else self._torch.cuda.stream(self._stream):
            out.copy_(buffer, non_blocking=True)
            if self._stream is not None:
                # A blocking event lets this thread sleep, and leaves its core to those that fill buffers.
                event = self._taken[self._next] = self._torch.cuda.Event(blocking=True)
                event.record(self._stream)
        self._next = (self._next + 1) % BUFFERS
