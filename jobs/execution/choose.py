"""Where units run is a choice: in this process, or on Ray. What a unit does is not."""

from __future__ import annotations

import os

from jobs.execution.cluster import Cluster, LocalCluster
from jobs.spec.job import ClusterSpec


def choose(spec: ClusterSpec) -> tuple[Cluster, str]:
    """The cluster that a spec asks for, and the reason where it leaves the choice open."""
    address = spec.address or os.environ.get("RAY_ADDRESS")
    if not is_local(spec):
        from jobs.execution.ray_cluster import RayCluster

        why = "" if spec.kind == "ray" else f"an address is given ({address})"
        return RayCluster(spec, address), why
    return LocalCluster(spec), "" if spec.kind == "local" else "no Ray address is given"


def is_local(spec: ClusterSpec) -> bool:
    """Whether units run in this process."""
    return spec.kind == "local" or (spec.kind == "auto" and not (spec.address or os.environ.get("RAY_ADDRESS")))
