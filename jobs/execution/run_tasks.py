"""Running tasks on a cluster under a progress display."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

from jobs.cli.progress import Meter
from jobs.execution.cluster import Cluster, R_co, Task, UnitFailed
from loaders.errors import StorageError


def run_tasks(
    cluster: Cluster, tasks: Sequence[Task[R_co]], doing: str, work_bytes: int
) -> Generator[R_co | UnitFailed]:
    """Outcomes as units finish, while the display counts `work_bytes` down. Closing the generator stops what runs.

    Raises:
        BadSpec: a task can never run there.
    """
    if not tasks:
        return
    cluster.check(tasks)
    with Meter(doing, work_bytes) as meter, closing(cluster.run(tasks, meter.add)) as outcomes:
        yield from outcomes


def run_all(cluster: Cluster, tasks: Sequence[Task[R_co]], doing: str, work_bytes: int) -> Generator[R_co]:
    """Reports as units finish; all must. The cluster is closed at the end.

    Raises:
        BadSpec: a task can never run there.
        StorageError: a unit could not be run.
    """
    try:
        with closing(run_tasks(cluster, tasks, doing, work_bytes)) as outcomes:
            for outcome in outcomes:
                if isinstance(outcome, UnitFailed):
                    raise StorageError(f"{outcome.unit}: {outcome.reason}")
                yield outcome
    finally:
        cluster.close()
