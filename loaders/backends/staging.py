"""Copying to a device through pinned memory, from which its copy engine reads while the CPU fills the next buffer.

Without it, torch copies pageable memory through a small buffer of the driver's, one piece after another. Each thread
has buffers and a stream of its own, so that none waits for another, and pieces of tensors that are wanted later follow
without a pause. For the CPU as the device, the same code copies through plain buffers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.backends.devices import torch_device

PART = 8 << 20  # bytes of a buffer: long enough for the link's full rate
BUFFERS = 2  # of a thread: one that the device reads, one that the thread fills
AHEAD = 1 << 28  # bytes of tensors that are begun before they are asked for; at least one is


@dataclass(frozen=True, slots=True)
class Filling:
    """A tensor to come: its bytes, and what fills an array with those from a byte on. Any thread calls it."""

    size: int
    fill: Callable[[int, np.ndarray], None]


class Staging:
    """Copies to one device. It holds BUFFERS * `part` bytes of pinned memory for each thread, until it is closed."""

    def __init__(self, device: str, threads: int, part: int = PART) -> None:
        self._torch, self._target = torch_device(device)
        self._is_cuda = self._target.type == "cuda"
        self._part = part
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="staging")
        self._own = threading.local()
        self._lanes: list[_Lane] = []

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *of_an_error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for lane in self._lanes:
            lane.close()

    def copied(self, fillings: Iterable[Filling]) -> Iterator[Any]:
        """Yield a uint8 tensor (size,) on the device for each filling, in order.

        On the device it is ready for whatever follows on the current stream. Errors of `fill` are raised in its turn.
        """
        begun: deque[tuple[Any, list[Future[Any]]]] = deque()
        total, left = 0, iter(fillings)
        while True:
            while (not begun or total < AHEAD) and (filling := next(left, None)) is not None:
                begun.append(self._begin(filling))
                total += filling.size
            if not begun:
                return
            out, pieces = begun.popleft()
            total -= out.numel()
            for piece in pieces:
                if (event := piece.result()) is not None:
                    self._torch.cuda.current_stream(self._target).wait_event(event)
            yield out
            del out

    def _begin(self, filling: Filling) -> tuple[Any, list[Future[Any]]]:
        out = self._torch.empty(filling.size, dtype=self._torch.uint8, device=self._target)
        # The allocator may give memory that kernels queued before still use.
        free = self._torch.cuda.current_stream(self._target).record_event() if self._is_cuda else None
        starts = range(0, filling.size, self._part)
        return out, [self._pool.submit(self._move, filling, at, out[at : at + self._part], free) for at in starts]

    def _move(self, filling: Filling, at: int, out: Any, free: Any) -> Any:
        """Fill a part of a tensor by way of this thread's next buffer; return the event of its arrival, on CUDA."""
        lane = getattr(self._own, "lane", None)
        if lane is None:
            lane = self._own.lane = _Lane(self._torch, self._target, self._part)
            self._lanes.append(lane)
        return lane.move(filling, at, out, free)


class _Lane:
    """A thread's buffers and its stream."""

    def __init__(self, torch: Any, target: Any, part: int) -> None:
        self._torch = torch
        self._stream = torch.cuda.Stream(target) if target.type == "cuda" else None
        pinned = self._stream is not None
        self._buffers = [torch.empty(part, dtype=torch.uint8, pin_memory=pinned) for _ in range(BUFFERS)]
        self._taken: list[Any] = [None] * BUFFERS  # events: the device has read what lay in the buffer
        self._next = 0

    def move(self, filling: Filling, at: int, out: Any, free: Any) -> Any:
        index, self._next = self._next, (self._next + 1) % BUFFERS
        if (event := self._taken[index]) is not None:
            event.synchronize()
        buffer = self._buffers[index][: out.numel()]
        filling.fill(at, buffer.numpy())
        with nullcontext() if self._stream is None else self._torch.cuda.stream(self._stream):
            if self._stream is not None:
                self._stream.wait_event(free)
            out.copy_(buffer, non_blocking=True)
            if self._stream is not None:
                # A blocking event lets this thread sleep, and leaves its core to those that fill buffers.
                event = self._taken[index] = self._torch.cuda.Event(blocking=True)
                event.record(self._stream)
        return event

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()  # the buffers are freed next, and must not be read any more
        self._buffers.clear()
