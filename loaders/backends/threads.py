"""A scheme's tools (`Work`) on threads: kernels, reusable memory, and the cut of a tensor into ranges."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any, TypeVar

from loaders.backends.scratch import Scratch
from loaders.errors import WeightmillError
from loaders.quantization.kernels import Kernels

# Weights in a range, 4 MiB of bfloat16. Longer ranges take more memory in every thread and leave threads idle at the
# end of a tensor; shorter ones cost more calls. Sums of errors depend on it in their last bits.
RANGE = 1 << 21
THREAD_BYTES = 12 * RANGE  # what a thread's buffers take at most: float32 source, decoded weights, codes
STAGING_BYTES = 12 * RANGE  # what its copies to and from a device take at most: float64 source, codes
T = TypeVar("T")


class Stopped(WeightmillError):
    """Raised in threads of a piece of work that was asked to stop."""


class ThreadedWork:
    """`Work` that runs ranges on the threads of a pool, or inline when it is called from one of them.

    Inside a pool's thread, waiting for other ranges of the same pool could block it for ever.
    """

    def __init__(self, kernels: Kernels, pool: ThreadPoolExecutor, stop: threading.Event) -> None:
        self.kernels = kernels
        self.array = Scratch().array
        self._pool = pool
        self._stop = stop
        self._inside = threading.local()

    def on(self, kernels: Kernels) -> ThreadedWork:
        """Return the same threads and memory with other kernels."""
        other = copy(self)
        other.kernels = kernels
        return other

    def sweep(self, count: int, align: int, body: Callable[[int, int], T]) -> list[T]:
        step = -(-RANGE // align) * align
        ranges = [(start, min(start + step, count)) for start in range(0, count, step)]
        if len(ranges) == 1 or getattr(self._inside, "is_worker", False):
            return [self._run(body, *each) for each in ranges]
        return list(self._pool.map(lambda each: self._run(body, *each), ranges))

    def each(self, items: list[Any], body: Callable[[Any], T]) -> list[T]:
        """Call the body for each item, a thread for each; sweeps inside stay on that thread."""

        def call(item: Any) -> T:
            self._inside.is_worker = True
            try:
                self.check()
                return body(item)
            finally:
                self._inside.is_worker = False

        return list(self._pool.map(call, items))

    def check(self) -> None:
        """Raise Stopped once a stop was asked for."""
        if self._stop.is_set():
            raise Stopped("stopped")

    def _run(self, body: Callable[[int, int], T], start: int, stop: int) -> T:
        self.check()
        return body(start, stop)
