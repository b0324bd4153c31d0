"""Clusters: the protocol for running units, retries of a unit, and the local cluster, which is this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from jobs.execution.live import Live
from jobs.output.journal import Journal
from jobs.planning.plan import Unit
from jobs.spec.cluster import ClusterSpec
from loaders.backends.machine import usable_cpus
from loaders.backends.threads import shared_crew
from loaders.errors import StorageError, TransientIOError, WeightmillError
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.words import counted

# A unit is tried four times, with pauses of 1, 2 and 4 seconds: long enough for most failures of a network to pass, and
# little time lost if the error is permanent after all.
ATTEMPTS = 4
FIRST_PAUSE_S = 1.0
# Units in flight beside each other share this process's threads. The threads work on the next unit while one is
# synced to the disk, read back and recorded, which takes a share of a unit's time that grows with the threads.
FEWEST_UNITS, MOST_UNITS, CPUS_A_UNIT = 2, 4, 8
OnBytes = Callable[[int], None]


class Report(Protocol):
    """The result of a unit."""

    @property
    def unit(self) -> str: ...

    @property
    def attempts(self) -> int: ...


R_co = TypeVar("R_co", bound=Report, covariant=True)


class Task(Protocol[R_co]):
    """A unit and its work: to encode it (jobs/execution/unit.py), or to verify it (jobs/verification/output.py)."""

    @property
    def unit(self) -> Unit: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def work_bytes(self) -> int:
        """The bytes that `on_bytes` is told in all; of what is shared with another tensor maybe more."""
        ...

    @property
    def gpus(self) -> int: ...

    @property
    def threads(self) -> int: ...

    @property
    def source(self) -> Address: ...

    @property
    def journals(self) -> Sequence[Journal]:
        """The journals of the unpublished outputs that it writes to."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """The bytes of its files on their way to a store, which lie in the machine's scratch folder."""
        ...

    @property
    def by_architecture(self) -> bool:
        """Whether CPUs of another architecture may find other bytes."""
        ...

    def reach(self) -> None:
        """Check that this process reads what the task reads.

        Raises:
            WeightmillError: it does not.
        """
        ...

    def run(self, on_bytes: OnBytes, stop: threading.Event) -> R_co: ...


def reach_source(source: Address, unit: Unit) -> None:
    """Read a byte of a unit's source, in the version that it was planned for. Errors as `Store.read`."""
    for entry in unit.sources[:1]:
        open_store(source).read(entry, 0, min(1, entry.size))


GO_ON = "run the same command against a cluster"


class ClusterLost(StorageError):
    """The cluster is gone, or has no machine left. What is done is kept, for the same command on another one."""


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """A unit that failed as a whole, for every target of its task."""

    unit: str
    reason: str


class Cluster(Protocol):
    """A place where units run: this process, or other processes and machines."""

    is_local: bool
    live: Live  # what flies, which the cluster tells as it runs

    @property
    def description(self) -> str: ...

    @property
    def threads(self) -> int:
        """The threads that work on a unit: those of this process, which its units share, or of a worker's process."""
        ...

    def check(self, tasks: Sequence[Task[Report]]) -> None:
        """Check that tasks can run here.

        Raises:
            BadSpec: a task needs more than any machine has.
        """
        ...

    def run(self, tasks: Sequence[Task[R_co]], on_bytes: OnBytes) -> Generator[R_co | UnitFailed]:
        """Yield outcomes as units finish. Closing the generator stops running units, which remove their part files."""
        ...

    def close(self) -> None:
        """Stop what was started for this job."""
        ...


def attempt(
    task: Task[R_co], on_bytes: OnBytes, stop: threading.Event, again: Callable[[], None] = lambda: None
) -> R_co | UnitFailed:
    """Run a unit, with retries after transient I/O errors. Another error of ours, or of the system, is its outcome.

    `again` is called before each retry.
    """
    for number in range(1, ATTEMPTS + 1):
        counted = 0

        def count(size: int) -> None:
            nonlocal counted
            counted += size
            on_bytes(size)

        try:
            return replace(task.run(count, stop), attempts=number)  # type: ignore[type-var]
        except TransientIOError as error:
            # The next attempt counts all bytes again.
            on_bytes(-counted)
            if number == ATTEMPTS or stop.wait(FIRST_PAUSE_S * 2 ** (number - 1)):
                return UnitFailed(task.unit.id, f"{error} (after {number} attempts)")
            again()
        except (WeightmillError, OSError) as error:
            return UnitFailed(task.unit.id, str(error))
    raise AssertionError("unreachable")


class LocalCluster:
    """A `Cluster` of this process's threads."""

    is_local = True

    def __init__(self, spec: ClusterSpec) -> None:
        self.live = Live()
        self._host = socket.gethostname()
        self.threads = spec.threads or usable_cpus()
        self.units_at_once = spec.units_at_once or min(MOST_UNITS, FEWEST_UNITS + self.threads // CPUS_A_UNIT)

    @property
    def description(self) -> str:
        return f"this process, {counted(self.threads, 'thread')}, up to {self.units_at_once} units at once"

    def check(self, tasks: Sequence[Task[Report]]) -> None:
        pass

    def run(self, tasks: Sequence[Task[R_co]], on_bytes: OnBytes) -> Generator[R_co | UnitFailed]:
        stop = threading.Event()
        todo, flight = list(reversed(tasks)), set[Future[R_co | UnitFailed]]()
        with shared_crew(self.threads):  # kept from unit to unit
            pool = ThreadPoolExecutor(self.units_at_once, thread_name_prefix="unit")
            try:
                while todo or flight:
                    while todo and len(flight) < self.units_at_once:
                        flight.add(pool.submit(self._attempt, todo.pop(), on_bytes, stop))
                    finished, flight = wait(flight, timeout=1, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield future.result()
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _attempt(self, task: Task[R_co], on_bytes: OnBytes, stop: threading.Event) -> R_co | UnitFailed:
        """Run a unit, and tell what becomes of it."""
        unit, host, live = task.unit.id, self._host, self.live

        def count(size: int) -> None:
            live.moved(unit, host, size)
            on_bytes(size)

        live.launched(unit, host)
        outcome = attempt(task, count, stop, lambda: live.repeated(host))
        if isinstance(outcome, UnitFailed):
            live.ended(unit, host, "stopped" if stop.is_set() else "failed", outcome.reason)
        else:
            live.ended(unit, host, "done")
        return outcome

    def close(self) -> None:
        pass
