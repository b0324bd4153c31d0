"""Running tasks on a cluster under a progress display."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from jobs.cli.progress import Meter
from jobs.execution.cluster import Cluster, R_co, Task, UnitFailed
from jobs.execution.live_text import WatchedLive
from loaders.errors import StorageError


def run_tasks(
    cluster: Cluster, tasks: Sequence[Task[R_co]], doing: str, work_bytes: int,
    also: Callable[[int], None] | None = None,
) -> Generator[R_co | UnitFailed]:  # fmt: skip
    """Run tasks and yield outcomes as units finish, with a progress display of `work_bytes`.

    `also` is told of the bytes, too, by one thread at a time. Closing the generator stops running units.

    Raises:
        BadSpec: a task can never run on this cluster.
        Whatever a program's progress function raises.
    """
    if not tasks:
        return
    cluster.check(tasks)
    cluster.live.begin(doing, len(tasks), work_bytes)
    # A cluster's description may ask its machines.
    watched = WatchedLive(cluster.live, cluster.description)
    with (
        Meter(doing, work_bytes, also=also, watched=watched) as meter,
        closing(cluster.run(tasks, meter.add)) as outcomes,
    ):
        for outcome in outcomes:
            meter.finished(outcome.unit)
            if meter.raised is not None:
                raise meter.raised
            yield outcome


def run_all(cluster: Cluster, tasks: Sequence[Task[R_co]], doing: str, work_bytes: int) -> Generator[R_co]:
    """Run tasks that must all succeed, and yield their reports as units finish. The cluster is closed at the end.

    Raises:
        BadSpec: a task can never run on this cluster.
        StorageError: a unit failed.
    """
    try:
        with closing(run_tasks(cluster, tasks, doing, work_bytes)) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome, UnitFailed):
                    raise StorageError(f"{outcome.unit}: {outcome.reason}")
                yield outcome
    finally:
        cluster.close()
