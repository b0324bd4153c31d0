"""Units as Ray tasks, on the Ray cluster at an address or on one started here. Only this folder imports ray.

A task gets paths, not weights, and returns a small report; its progress is a stream. Each attempt is placed on a
machine, and repeated, from here, see dispatch.py: when a whole machine dies, Ray 2.60 notices within seconds but
retries its tasks only after minutes, and what is frozen it never repeats. Each task requests the CPUs and the memory of
its plan, and a request that no machine can serve is refused before anything runs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Sequence

from jobs.execution.cluster import OnBytes, R_co, Report, Task, UnitFailed
from jobs.execution.live import Live
from jobs.execution.ray.dispatch import Dispatch
from jobs.execution.ray.fitting import Scaling, await_machines, check_fits
from jobs.execution.ray.flights import Flights
from jobs.execution.ray.machines import MOST_THREADS, Machine, live_machines, threads_of
from jobs.execution.ray.own import OwnRay
from jobs.execution.ray.placement import Placement
from jobs.execution.ray.start import connect
from jobs.execution.ray.watch import Watch
from jobs.spec.cluster import ClusterSpec
from loaders.backends.machine import usable_cpus
from loaders.words import counted

CLOSE_S = 30.0  # seconds that Ray gets to stop attempts, and again to disconnect
SOME_S = 10.0  # seconds without a word of the head after which it is asked nothing more
LOST_S = 5.0  # seconds to disconnect from a cluster whose head is gone


class RayCluster:
    """A `Cluster` of Ray's workers."""

    is_local = False

    def __init__(self, spec: ClusterSpec, address: str | None) -> None:
        self._spec = spec
        self._address = address
        self.threads = spec.threads or min(usable_cpus(), MOST_THREADS)
        self.live = Live()
        self._said = set[str]()
        self._is_lost = False
        self._scaling = Scaling(spec)
        self._own = None if address else OwnRay()
        try:
            self._ray = connect(spec, address, self._own)
            self._watch = Watch(self._ray, self._where)
        except BaseException:
            self._end()
            raise
        try:
            await_machines(self._ray, spec, self._scaling)
        except BaseException:
            self.close()
            raise
        self._machines = live_machines(self._ray)
        if address:
            self.threads = threads_of(self._machines, spec)

    @property
    def description(self) -> str:
        machines = [machine for machine in self._machines if machine.fits(self._spec)]
        cpus = sum(machine.cpus for machine in machines)
        return f"{self._where}: {counted(len(machines), 'machine')}, {cpus:.0f} CPUs, {self.threads} threads a unit"

    @property
    def _where(self) -> str:
        return f"the Ray cluster at {self._address}" if self._address else "Ray, started here"

    def check(self, tasks: Sequence[Task[Report]]) -> None:
        check_fits(self._ray, self._spec, self.threads, tasks, self._scaling)

    def run(self, tasks: Sequence[Task[R_co]], on_bytes: OnBytes) -> Generator[R_co | UnitFailed]:
        self._watch.await_head()
        placement = Placement(self._ray, self._spec, self.threads, tasks, is_joined=self._own is None, said=self._said)
        for line in placement.lines:
            placement.say(line)
        flights = Flights(self._ray)
        dispatch = Dispatch(
            flights, placement, self._watch, self.live, threads=self.threads,
            at_once=self._spec.units_at_once or sys.maxsize, retries=self._spec.retries,
        )  # fmt: skip
        try:
            yield from dispatch.run(tasks, on_bytes)
        finally:
            self._machines = [Machine.of(node) for node in self._watch.nodes if node["Alive"]]
            self._is_lost = self._watch.silent_s > SOME_S
            within(LOST_S if self._is_lost else CLOSE_S, flights.close)
            if not self._is_lost:
                placement.close()

    def close(self) -> None:
        """Disconnect; a cluster that was started here is stopped, a joined one stays."""
        self._watch.close()
        if not self._is_lost:
            self._scaling.close()
        within(LOST_S if self._is_lost else CLOSE_S, self._ray.shutdown)
        self._end()

    def _end(self) -> None:
        if self._own is not None:
            self._own.close()


def within(seconds: float, call: Callable[[], None]) -> None:
    """Call a function that may never return, as Ray's when its processes are frozen, and wait so long at most."""
    thread = threading.Thread(target=call, name="ray-close", daemon=True)
    thread.start()
    thread.join(seconds)
