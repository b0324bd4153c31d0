"""The machines of a Ray cluster: what they offer, and which of them can do a job's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jobs.cli.verb import note
from jobs.execution.cluster import Task
from jobs.execution.ray.flights import said_by_ray
from jobs.execution.ray.worker import ask_remotely
from loaders.errors import StorageError
from loaders.storage.settings import current

ASK_S = 120.0  # seconds that a machine has to answer whether it can work, with the start of a worker


def live_nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def slots(resources: dict[str, Any], threads: int, gpus: int) -> int:
    """Return how many units run side by side on a machine."""
    by_cpu = int(resources.get("CPU", 0) // threads)
    return min(by_cpu, int(resources.get("GPU", 0) // gpus)) if gpus else by_cpu


def left_out(ray: Any, task: Task[Any]) -> list[str]:
    """Ask every machine whether it reads the source and writes the output; returns the ids of those that do not.

    Raises:
        StorageError: none does.
    """
    nodes = {n["NodeID"]: n["NodeManagerHostname"] for n in live_nodes(ray) if n["Resources"].get("CPU", 0)}
    found = {node: reason for node, reason in _asked(ray, task, list(nodes)).items() if reason}
    for node, reason in found.items():
        note(f"{nodes[node]} ({node[:8]}) is left out: {reason}")
    if nodes and len(found) == len(nodes):
        raise StorageError(
            "cluster: no machine reads the source and writes the output: its workers need the same access as this"
            " process, in their own environment (credentials, mounted folders)"
        )
    return list(found)


def _asked(ray: Any, task: Task[Any], nodes: Sequence[str]) -> dict[str, str]:
    """Return what is wrong with each machine; an empty text if nothing is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    ask = ray.remote(ask_remotely)
    settings = replace(current(), patience_s=min(current().patience_s, ASK_S / 4))
    asked = {
        ask.options(num_cpus=0, max_retries=0, scheduling_strategy=On(node, soft=False)).remote(task, settings): node
        for node in nodes
    }
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S)
    found = {asked[each]: f"no answer within {ASK_S:.0f} s" for each in silent}
    for each in answered:
        try:
            found[asked[each]] = ray.get(each)
        except ray.exceptions.RayError as error:
            found[asked[each]] = said_by_ray(error)
    return found
