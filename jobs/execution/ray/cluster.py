"""Units as Ray tasks, on the Ray cluster at an address or on one started here. Only this folder imports ray.

A task gets paths, not weights, and returns a small report; its progress is a stream. Ray retries a task whose worker
process dies. When a whole machine dies, Ray 2.60 notices within seconds but retries its tasks only after minutes, so
they are submitted again here; if both attempts finish, the second replaces files by equal ones. Each task requests the
CPUs and the memory of its plan, and a request that no machine can serve is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from jobs.execution.cluster import OnBytes, R_co, Report, Task, UnitFailed
from jobs.execution.live import Live
from jobs.execution.ray.flights import Flights, memory_bytes
from jobs.execution.ray.nodes import left_out, live_nodes, slots
from jobs.execution.ray.own import OwnRay
from jobs.execution.ray.start import connect
from jobs.execution.ray.watch import Watch
from jobs.spec.cluster import ClusterSpec
from loaders.backends.machine import usable_cpus
from loaders.errors import BadSpec
from loaders.words import counted

MOST_THREADS = 8  # threads of a unit; with more cores, several units side by side use a machine better


class RayCluster:
    """A `Cluster` of Ray's workers."""

    is_local = False

    def __init__(self, spec: ClusterSpec, address: str | None) -> None:
        self.live = Live()
        self._spec = spec
        self._address = address
        self._at_once = 1
        self.threads = spec.threads or min(usable_cpus(), MOST_THREADS)
        self._own = None if address else OwnRay()
        try:
            self._ray = connect(spec, address, self._own)
        except BaseException:
            self._end()
            raise
        if address and not spec.threads:
            most = max((node["Resources"].get("CPU", 0) for node in live_nodes(self._ray)), default=1)
            self.threads = max(1, min(int(most), MOST_THREADS))

    @property
    def description(self) -> str:
        nodes = live_nodes(self._ray)
        cpus = sum(node["Resources"].get("CPU", 0) for node in nodes)
        where = f"the Ray cluster at {self._address}" if self._address else "Ray, started here"
        return f"{where}: {counted(len(nodes), 'machine')}, {cpus:.0f} CPUs, {self.threads} threads a unit"

    def check(self, tasks: Sequence[Task[Report]]) -> None:
        nodes = live_nodes(self._ray)
        gpus = max((task.gpus for task in tasks), default=0)
        nodes = [node for node in nodes if node["Resources"].get("GPU", 0) >= gpus]
        if not nodes:
            raise BadSpec(
                "cluster: a unit on backend=cuda needs a GPU, and no machine offers one to Ray; use backend=cpu"
            )
        need = max((memory_bytes(task) for task in tasks), default=0)
        fits = [
            node
            for node in nodes
            if node["Resources"].get("CPU", 0) >= self.threads and node["Resources"].get("memory", 0) >= need
        ]
        if not fits:
            largest = max(nodes, key=lambda node: node["Resources"].get("CPU", 0))["Resources"]
            raise BadSpec(
                f"cluster: a unit needs {self.threads} CPUs and {need / 1e9:.2f} GB of memory; the largest machine"
                f" offers {largest.get('CPU', 0):.0f} and {largest.get('memory', 0) / 1e9:.2f} GB; lower threads"
            )
        at_once = sum(slots(node["Resources"], self.threads, gpus) for node in nodes)
        # As many tasks wait at the machines as run there, so that none idles while the driver submits the next.
        self._at_once = self._spec.units_at_once or 2 * max(1, at_once)

    def run(self, tasks: Sequence[Task[R_co]], on_bytes: OnBytes) -> Generator[R_co | UnitFailed]:
        without = left_out(self._ray, tasks[0]) if self._address and tasks else []
        flights = Flights(self._ray, self.threads, without)
        watch = Watch(self._ray)
        todo = {task.unit.id: task for task in tasks}
        waiting = list(reversed(tasks))
        try:
            while todo:
                while waiting and len(flights) < self._at_once:
                    flights.launch(waiting.pop())
                for unit, outcome in flights.advance(on_bytes):
                    if todo.pop(unit, None) is not None:
                        yield outcome
                        flights.forget(unit)
                for task in flights.lost(watch.dead):
                    if task.unit.id in todo:
                        flights.launch(task)
        finally:
            watch.close()
            flights.cancel()

    def close(self) -> None:
        """Disconnect; a cluster that was started here is stopped, a joined one stays."""
        self._ray.shutdown()
        self._end()

    def _end(self) -> None:
        if self._own is not None:
            self._own.close()
