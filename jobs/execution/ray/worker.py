"""What a Ray worker does: it runs units and tells their progress, or says whether this machine can work at all."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from jobs.cli.early import be_program
from jobs.execution.cluster import Task, UnitFailed, attempt
from loaders.backends.machine import free_memory, total_memory
from loaders.errors import WeightmillError
from loaders.storage.settings import StoreSettings, use
from loaders.storage.traffic import moved_bytes

PROGRESS_S = 0.5  # seconds between two messages of progress: smooth for a person, and few for Ray
# Bytes of this process' reads and writes that count as progress. What its threads for Ray move meanwhile is far less.
SIGN_BYTES = 1 << 20
SHORT = 0.1  # a machine is short of memory if less than this part of it is free
Message = list[tuple[str, Any]]  # events, each with its kind


def ask_remotely(task: Task[Any], settings: StoreSettings) -> str:
    """Return why a Ray worker cannot do a task, with the driver's settings of stores; an empty text if it can."""
    use(settings)
    try:
        task.reach()
    except (WeightmillError, OSError) as error:
        return str(error)
    return ""


def run_remotely(tasks: Sequence[Task[Any]], settings: StoreSettings, every_s: float = PROGRESS_S) -> Iterator[Message]:
    """Run tasks in a Ray worker, one after another, with the driver's settings of stores.

    Yields messages, which are lists of events: first "began"; then for each task "unit" with its
    id, "bytes" of work done, and "outcome"; and between them "moved" for bytes from and to stores, "sign" if the
    process has read or written without doing work bytes (while it syncs, uploads or reads back), "compiling", and
    "short" with whether this machine has little memory left.

    The tasks run on a thread, so that this generator can send progress meanwhile, and so that cancelling the Ray task,
    which interrupts the generator, can stop the unit and wait until its part files are removed.
    """
    be_program()
    use(settings)
    yield [("began", None)]
    stop, done, news = threading.Event(), threading.Event(), News()
    failed: list[BaseException] = []

    def work() -> None:
        from loaders.quantization.kernels.compiling import compiling  # numba, which is slow to import

        try:
            with compiling(lambda: news.tell("compiling", None)):
                for task in tasks:
                    if stop.is_set():
                        break
                    news.tell("unit", task.unit.id)
                    news.tell("outcome", _outcome(task, news, stop))
        # It is raised again below, on the thread that Ray watches.
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not done.wait(every_s):
            if message := news.take():
                yield message
    finally:
        # The task was cancelled, or is done. The unit removes its part files before it ends.
        stop.set()
        thread.join()
    if message := news.take():
        yield message
    if failed:
        raise failed[0]


def _outcome(task: Task[Any], news: News, stop: threading.Event) -> Any:
    try:
        return attempt(task, news.count, stop)
    # Whatever it is, it is the unit's outcome: Ray would pass it on as a traceback.
    except Exception as error:
        first = next(iter(str(error).splitlines()), "no message")
        return UnitFailed(task.unit.id, f"{type(error).__name__}: {first}")


class News:
    """What has happened in this process since it was last told, in order. Any thread may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: Message = []
        self._counted = 0
        self._moved = dict(moved_bytes())  # a worker process runs many tasks
        self._touched = touched_bytes()
        self._is_short = False

    def count(self, size: int) -> None:
        with self._lock:
            self._counted += size

    def tell(self, kind: str, value: Any) -> None:
        with self._lock:
            self._settle()
            if kind != "compiling" or self._events[-1:] != [(kind, value)]:
                self._events.append((kind, value))

    def _settle(self) -> None:
        if self._counted:
            self._events.append(("bytes", self._counted))
            self._counted = 0

    def take(self) -> Message:
        """Return the events, which are then told."""
        moved, touched, is_short = dict(moved_bytes()), touched_bytes(), is_short_of_memory()
        with self._lock:
            self._settle()
            events, self._events = self._events, []
        if moved != self._moved:
            events.append(("moved", {word: moved[word] - self._moved[word] for word in moved}))
            self._moved = moved
        if touched - self._touched >= SIGN_BYTES:
            self._touched = touched
            if not events:
                events.append(("sign", None))
        if is_short != self._is_short:
            self._is_short = is_short
            events.append(("short", is_short))
        return events


def touched_bytes() -> int:
    """Return the bytes that this process has read and written so far, whether by calls or by maps; 0 if unknown."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/io") as file:  # noqa: PTH123
        return sum(int(line.split()[1]) for line in file if line.startswith(("rchar", "wchar", "read_b", "write_b")))


def is_short_of_memory() -> bool:
    return free_memory() < SHORT * total_memory()
