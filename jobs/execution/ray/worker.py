"""What a Ray worker does: it runs a unit and tells its progress, or says whether this machine can work at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from jobs.cli.early import be_program
from jobs.execution.cluster import Task, attempt
from loaders.errors import WeightmillError
from loaders.storage.settings import StoreSettings, use
from loaders.storage.traffic import moved_bytes

PROGRESS_S = 0.5  # seconds between two messages of progress: smooth for a person, and few for Ray


def ask_remotely(task: Task[Any], settings: StoreSettings) -> str:
    """Return why a Ray worker cannot do a task, with the driver's settings of stores; an empty text if it can."""
    use(settings)
    try:
        task.reach()
    except (WeightmillError, OSError) as error:
        return str(error)
    return ""


def run_remotely(task: Task[Any], settings: StoreSettings) -> Iterator[tuple[str, Any]]:
    """Run a task in a Ray worker, with the driver's settings of stores.

    Yields first its node's id, then bytes done and bytes moved from and to stores, last the outcome.

    The unit runs on a thread, so that this generator can send progress meanwhile, and so that cancelling the task,
    which interrupts the generator, can stop the unit and wait until its part files are removed.
    """
    import ray

    be_program()
    use(settings)
    yield "node", ray.get_runtime_context().get_node_id()
    stop, done = threading.Event(), threading.Event()
    counted: list[int] = [0]
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(attempt(task, lambda size: counted.__setitem__(0, counted[0] + size), stop))
        # It is raised again below, on the thread that Ray watches.
        except BaseException as error:
            found.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    told, moved = 0, dict(moved_bytes())  # a worker process runs many tasks

    def news() -> Iterator[tuple[str, Any]]:
        nonlocal told, moved
        now, then = dict(moved_bytes()), moved
        if now != then:
            moved = now
            yield "moved", {word: now[word] - then[word] for word in now}
        if counted[0] != told:
            before, told = told, counted[0]
            yield "bytes", told - before

    thread.start()
    try:
        while not done.wait(PROGRESS_S):
            yield from news()
    finally:
        # The task was cancelled, or is done. The unit removes its part files before it ends.
        stop.set()
        thread.join()
    yield from news()
    if isinstance(found[0], BaseException):
        raise found[0]
    yield "outcome", found[0]
