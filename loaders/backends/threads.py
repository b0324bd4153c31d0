"""A scheme's tools (`Work`) on threads: kernels, reusable memory, and the cut of a tensor into ranges.

Threads share work without barriers between tensors: a thread first takes a range of a tensor that is already open, and
opens the next tensor where no range is left. So every thread has work in every tensor, tensors are read in about their
order, and few of them are open at a time. Where several pieces of work, such as a job's units, share a crew of threads,
each thread goes to the one that fewest work on: threads that write the same file wait for each other in the kernel.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, Generic, TypeVar

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


class Crew(ThreadPoolExecutor):
    """Worker threads, which several pieces of work may share, and memory that they may use again from work to work."""

    def __init__(self, threads: int, thread_name_prefix: str = "worker") -> None:
        super().__init__(threads, thread_name_prefix)
        self.threads = threads
        self.scratch = Scratch()
        self._lock = threading.Lock()
        self._works: list[_Queue] = []  # a piece of work is there once for each call that waits for it
        self._awake = 0  # threads that look for steps, or will
        self._own = threading.local()

    @property
    def is_on(self) -> bool:
        """Whether this thread is one of the crew's, which must not wait for a free one."""
        return getattr(self._own, "is_on", False)

    @contextmanager
    def listed(self, work: _Queue) -> Iterator[None]:
        """Have a piece of work among those that threads look at."""
        with self._lock:
            self._works.append(work)
        try:
            yield
        finally:
            with self._lock:
                self._works.remove(work)

    def wake(self, steps: int) -> None:
        """Let as many threads as there are steps look for what they can take, in any piece of work."""
        with self._lock:
            woken = max(0, min(steps, self.threads - self._awake))
            self._awake += woken
        for _ in range(woken):
            self.submit(self._serve)

    def _serve(self) -> None:
        self._own.is_on = True
        while (work := self._least_helped()) is not None:
            try:
                work.help()
            finally:
                with self._lock:
                    work.helpers -= 1

    def _least_helped(self) -> _Queue | None:
        with self._lock:
            waiting = (work for work in self._works if work.has_steps)
            found = min(waiting, key=lambda work: work.helpers, default=None)
            if found is None:
                self._awake -= 1  # under the lock, or `wake` could count on a thread that has seen nothing to do
            else:
                found.helpers += 1
            return found


_SHARED: dict[int, tuple[Crew, list[object]]] = {}
_LOCK = threading.Lock()


@contextmanager
def shared_crew(threads: int) -> Iterator[Crew]:
    """Give the process's crew of so many threads. It is there as long as any context of it is open."""
    user = object()
    with _LOCK:
        if threads not in _SHARED:
            _SHARED[threads] = Crew(threads), []
        crew, users = _SHARED[threads]
        users.append(user)
    try:
        yield crew
    finally:
        with _LOCK:
            users.remove(user)
            if is_last := not users:
                del _SHARED[threads]
        if is_last:
            crew.shutdown()


class ThreadedWork:
    """`Work` on the threads of a crew."""

    def __init__(self, kernels: Kernels, crew: Crew, stop: threading.Event, scratch: Scratch | None = None) -> None:
        """`scratch` is memory that outlives this work; by default its own is freed with it."""
        self.kernels = kernels
        self.array = (scratch or Scratch()).array
        self._crew = crew
        self._open = _Queue(stop)

    def on(self, kernels: Kernels) -> ThreadedWork:
        """Return the same threads and memory with other kernels."""
        other = copy(self)
        other.kernels = kernels
        return other

    def sweep(self, count: int, align: int, body: Callable[[int, int], T]) -> list[T]:
        ranges = self.ranges(count, align)
        # A range's body never waits for other ranges: it runs a sweep of its own on its own thread.
        if len(ranges) <= 1 or self._crew.threads == 1 or self._open.is_in_range:
            return [self._open.run(partial(body, *each), "range") for each in ranges]
        return self._share(self._open.add([partial(body, *each) for each in ranges], "range"))

    def ranges(self, count: int, align: int) -> list[tuple[int, int]]:
        step = -(-RANGE // align) * align
        return [(start, min(start + step, count)) for start in range(0, count, step)]

    def each(self, items: Sequence[Any], body: Callable[[Any], T]) -> list[T]:
        """Call the body for each item, in about their order; the sweeps inside are shared by all threads."""
        if not items:
            return []
        return self._share(self._open.add([partial(body, item) for item in items], "item"))

    def _share(self, steps: _Steps[T]) -> list[T]:
        """Let the crew work on steps until all are done; return their results, or raise the first step's error."""
        takes_part = self._crew.is_on
        with self._crew.listed(self._open):
            try:
                self._crew.wake(len(steps) - takes_part)
                while takes_part and (step := steps.take()) is not None:
                    self._open.do(steps, step)
                return steps.results()
            finally:
                steps.end()

    def check(self) -> None:
        """Raise Stopped once a stop was asked for."""
        self._open.check()


class _Queue:
    """What a piece of work has open: sweeps with ranges that no thread has taken yet, then items."""

    def __init__(self, stop: threading.Event) -> None:
        self.helpers = 0  # threads that take part, by the crew's count
        self._stop = stop
        self._inside = threading.local()
        self._changed = threading.Condition()
        self._steps: dict[str, deque[_Steps[Any]]] = {"range": deque(), "item": deque()}

    @property
    def is_in_range(self) -> bool:
        """Whether this thread runs a range now."""
        return getattr(self._inside, "of", "") == "range"

    def add(self, calls: Sequence[Callable[[], T]], kind: str) -> _Steps[T]:
        steps = _Steps(calls, kind, self._changed)
        with self._changed:
            self._steps[kind].append(steps)
        return steps

    @property
    def has_steps(self) -> bool:
        return any(steps.is_left for found in self._steps.values() for steps in list(found))

    def help(self) -> None:
        """Take part in what is open until nothing is left to take."""
        while (found := self._next()) is not None:
            self.do(*found)

    def _next(self) -> tuple[_Steps[Any], int] | None:
        with self._changed:
            for found in self._steps.values():  # ranges before items
                while found:
                    if (step := found[0].take()) is not None:
                        return found[0], step
                    found.popleft()
        return None

    def do(self, steps: _Steps[Any], step: int) -> None:
        """Run a step that was taken."""
        try:
            steps.done(step, self.run(steps.calls[step], steps.kind), None)
        except BaseException as error:  # raised again on the thread that waits for the steps
            steps.done(step, None, error)

    def run(self, call: Callable[[], T], kind: str) -> T:
        self.check()
        outer, self._inside.of = getattr(self._inside, "of", ""), kind
        try:
            return call()
        finally:
            self._inside.of = outer

    def check(self) -> None:
        if self._stop.is_set():
            raise Stopped("stopped")


class _Steps(Generic[T]):
    """Calls that any thread may take, each once. After an error no further one is taken."""

    def __init__(self, calls: Sequence[Callable[[], T]], kind: str, changed: threading.Condition) -> None:
        self.calls = calls
        self.kind = kind
        self._changed = changed
        self._taken = 0
        self._running = 0
        self._results: list[Any] = [None] * len(calls)
        self._errors: dict[int, BaseException] = {}

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def is_left(self) -> bool:
        """Whether there is a call to take, as far as can be seen without waiting for another thread."""
        return self._taken < len(self.calls)

    def take(self) -> int | None:
        with self._changed:
            if self._taken >= len(self.calls):
                return None
            self._taken, self._running = self._taken + 1, self._running + 1
            return self._taken - 1

    def done(self, step: int, result: T | None, error: BaseException | None) -> None:
        with self._changed:
            self._running -= 1
            self._results[step] = result
            if error is not None:
                self._errors[step] = error
                self._taken = len(self.calls)
            if not self._running and self._taken >= len(self.calls):
                self._changed.notify_all()

    def results(self) -> list[T]:
        """Wait for all steps; return their results in order, or raise the error of the first that failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running and self._taken >= len(self.calls))
        if self._errors:
            raise self._errors[min(self._errors)]
        return self._results

    def end(self) -> None:
        """Let no further step be taken, and wait for those that run: they may use files that the caller closes."""
        with self._changed:
            self._taken = len(self.calls)
            self._changed.wait_for(lambda: not self._running)
