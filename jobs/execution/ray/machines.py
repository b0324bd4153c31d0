"""The machines of a Ray cluster: what each offers, and how many units run on it at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jobs.execution.cluster import Task
from jobs.spec.cluster import ClusterSpec
from loaders.words import counted

MOST_THREADS = 8  # threads of a unit; with more cores, several units side by side use a machine better
BASE_BYTES = 300 << 20  # bytes of a worker process with its libraries, before it has any weights
SHOWN = 4  # names of machines that a list gives before it counts the rest


def memory_bytes(task: Task[Any]) -> int:
    """Return the memory that a task requests: of a worker with its libraries, and what the unit holds."""
    return BASE_BYTES + task.memory_bytes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node of a Ray cluster. `offers` has its resources by Ray's names: CPU, GPU, memory (bytes) and custom ones."""

    id: str
    name: str
    offers: Mapping[str, float]
    labels: Mapping[str, str]

    @staticmethod
    def of(node: Mapping[str, Any]) -> Machine:
        """Make a machine of a row of `ray.nodes()`."""
        offers, labels = node["Resources"], node.get("Labels") or {}
        return Machine(id=node["NodeID"], name=node["NodeManagerHostname"], offers=offers, labels=labels)

    @property
    def cpus(self) -> float:
        return self.offers.get("CPU", 0)

    @property
    def gpus(self) -> float:
        return self.offers.get("GPU", 0)

    def threads(self, most: int) -> int:
        """Return the threads of a unit here: `most`, or fewer if it has fewer CPUs."""
        return max(1, min(most, int(self.cpus)))

    def fits(self, spec: ClusterSpec) -> bool:
        """Whether it has a CPU, and the labels and the custom resources that the settings ask for."""
        has_labels = all(self.labels.get(name) == value for name, value in spec.labels.items())
        return self.cpus >= 1 and has_labels and all(self.offers.get(n, 0) >= v for n, v in spec.resources.items())

    def units(self, need: Need, spec: ClusterSpec) -> int:
        """Return how many units of a kind run here at once."""
        by = [self.cpus // need.threads, self.offers.get("memory", 0) // need.memory]
        by += [self.offers.get(name, 0) // amount for name, amount in spec.resources.items()]
        by += [self.gpus // need.gpus] if need.gpus else []
        by += [spec.units_per_node] if spec.units_per_node is not None else []
        return int(min(by))


@dataclass(frozen=True)
class Need:
    """What an attempt requests of a machine; memory in bytes."""

    threads: int
    gpus: int
    memory: int

    @staticmethod
    def of(task: Task[Any], threads: int, memory_times: int = 1) -> Need:
        return Need(threads, task.gpus, memory_times * memory_bytes(on(task, threads)))

    def options(self, spec: ClusterSpec) -> dict[str, Any]:
        """Return the options of the Ray task that request it."""
        found: dict[str, Any] = {"num_cpus": self.threads, "num_gpus": self.gpus, "memory": self.memory}
        return {**found, "resources": dict(spec.resources)} if spec.resources else found

    def bundle(self, spec: ClusterSpec, *, with_memory: bool = False) -> dict[str, float]:
        """Return it as Ray's autoscaler takes it. Not every one knows the memory of machines that it could start."""
        gpus = {"GPU": self.gpus} if self.gpus else {}
        memory = {"memory": self.memory} if with_memory else {}
        return {"CPU": self.threads, **gpus, **memory, **spec.resources}

    def __str__(self) -> str:
        gpus = f", {counted(self.gpus, 'GPU')}" if self.gpus else ""
        return f"{self.threads} CPUs{gpus} and {self.memory / 1e9:.2f} GB of memory"


def on(task: Task[Any], threads: int) -> Task[Any]:
    """Return a task as it runs on so many threads, which changes nothing in its bytes."""
    return task if task.threads == threads else replace(task, threads=threads)  # type: ignore[type-var]


def live_machines(ray: Any) -> list[Machine]:
    return [Machine.of(node) for node in ray.nodes() if node["Alive"]]


def threads_of(machines: Iterable[Machine], spec: ClusterSpec) -> int:
    """Return the threads of a unit on a cluster: as many as its largest machine has CPUs, but not too many."""
    most = max((machine.cpus for machine in machines if machine.fits(spec)), default=1)
    return spec.threads or max(1, min(int(most), MOST_THREADS))


def named(machines: Iterable[Machine], among: Iterable[Machine] = ()) -> str:
    """Return the names of machines, the first ones of many.

    Of these and those that they are `among`, nodes of one name are told apart by Ray's ids.
    """
    rows = list(machines)
    same = Counter(machine.name for machine in {machine.id: machine for machine in (*rows, *among)}.values())
    names = [row.name if same[row.name] == 1 else f"{row.name} ({row.id[:8]})" for row in rows]
    rest = len(names) - SHOWN
    if rest > 1:
        return f"{', '.join(names[:SHOWN])} and {rest} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def told(machines: Iterable[Machine], need: Mapping[str, Need], spec: ClusterSpec) -> list[str]:
    """Return which machines take part, with how many units at once: a line for all that are alike.

    `need` has what a unit needs, by the machine's id.
    """
    alike: dict[tuple[int, int, int], list[Machine]] = {}
    for machine in machines:
        units = machine.units(need[machine.id], spec)
        alike.setdefault((units, need[machine.id].threads, need[machine.id].gpus), []).append(machine)
    lines = []
    for (units, threads, gpus), rows in sorted(alike.items(), reverse=True):
        each, with_gpu = " each" if len(rows) > 1 else "", " and a GPU" if gpus else ""
        lines.append(
            f"{named(rows)}: {counted(units, 'unit')} at once{each}, of {counted(threads, 'thread')}{with_gpu}"
        )
    return lines
