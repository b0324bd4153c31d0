"""Units as Ray tasks, on the Ray cluster at an address or on one started here. Only this folder imports ray.

A task gets paths, not weights, and returns a small report; its progress is a stream. Ray retries a task whose worker
process dies. When a whole machine dies, Ray 2.60 notices within seconds but retries its tasks only after minutes, so
they are submitted again here; if both attempts finish, the second replaces files by equal ones. Each task requests the
CPUs and the memory of its plan, and a request that no machine can serve is refused before anything runs.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

from jobs.cli.verb import note
from jobs.execution.cluster import OnBytes, R_co, Report, Task, UnitFailed
from jobs.execution.ray.fitting import Scaling, await_machines, check_fits
from jobs.execution.ray.flights import Flights
from jobs.execution.ray.machines import live_machines
from jobs.execution.ray.own import OwnRay
from jobs.execution.ray.placement import Placement
from jobs.execution.ray.start import connect
from jobs.execution.ray.watch import WATCH_S, Watch
from jobs.spec.cluster import ClusterSpec
from loaders.backends.machine import usable_cpus
from loaders.words import counted

MOST_THREADS = 8  # threads of a unit; with more cores, several units side by side use a machine better


class RayCluster:
    """A `Cluster` of Ray's workers."""

    is_local = False

    def __init__(self, spec: ClusterSpec, address: str | None) -> None:
        self._spec = spec
        self._address = address
        self._scaling = Scaling(spec)
        self.threads = spec.threads or min(usable_cpus(), MOST_THREADS)
        self._own = None if address else OwnRay()
        try:
            self._ray = connect(spec, address, self._own)
        except BaseException:
            self._end()
            raise
        try:
            await_machines(self._ray, spec, self._scaling)
        except BaseException:
            self.close()
            raise
        if address and not spec.threads:
            most = max((machine.cpus for machine in live_machines(self._ray) if machine.fits(spec)), default=1)
            self.threads = max(1, min(int(most), MOST_THREADS))

    @property
    def description(self) -> str:
        machines = [machine for machine in live_machines(self._ray) if machine.fits(self._spec)]
        cpus = sum(machine.cpus for machine in machines)
        where = f"the Ray cluster at {self._address}" if self._address else "Ray, started here"
        return f"{where}: {counted(len(machines), 'machine')}, {cpus:.0f} CPUs, {self.threads} threads a unit"

    def check(self, tasks: Sequence[Task[Report]]) -> None:
        check_fits(self._ray, self._spec, self.threads, tasks, self._scaling)

    def run(self, tasks: Sequence[Task[R_co]], on_bytes: OnBytes) -> Generator[R_co | UnitFailed]:
        placement = Placement(self._ray, self._spec, self.threads, tasks, is_joined=self._address is not None)
        for line in placement.lines:
            note(line)
        flights = Flights(self._ray)
        watch = Watch(self._ray)
        todo = {task.unit.id: task for task in tasks}
        waiting, looked_s = list(reversed(tasks)), time.monotonic()
        try:
            while todo:
                if time.monotonic() - looked_s > WATCH_S:
                    placement.refresh(self._ray.nodes(), len(todo))
                    looked_s = time.monotonic()
                while waiting and (spot := placement.place(waiting[-1], flights.by_node)) is not None:
                    flights.launch(waiting.pop(), spot)
                for unit, outcome in flights.advance(on_bytes):
                    if todo.pop(unit, None) is not None:
                        yield outcome
                        flights.forget(unit)
                for task in flights.lost(watch.dead):
                    if task.unit.id in todo:
                        waiting.append(task)
        finally:
            watch.close()
            flights.cancel()
            placement.close()

    def close(self) -> None:
        """Disconnect; a cluster that was started here is stopped, a joined one stays."""
        self._scaling.close()
        self._ray.shutdown()
        self._end()

    def _end(self) -> None:
        if self._own is not None:
            self._own.close()
