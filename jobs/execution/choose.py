"""The choice of a cluster: this process, or Ray. The work of a unit is the same on both."""

from __future__ import annotations

import os

from jobs.execution.cluster import Cluster, LocalCluster
from jobs.spec.job import ClusterSpec


def choose(spec: ClusterSpec) -> tuple[Cluster, str]:
    """Return the cluster that the settings ask for, and the reason if the choice was left open (else "")."""
    address = spec.address or os.environ.get("RAY_ADDRESS")
    if not is_local(spec):
        from jobs.execution.ray_cluster import RayCluster

        why = "" if spec.kind == "ray" else f"an address is given ({address})"
        return RayCluster(spec, address), why
    return LocalCluster(spec), "" if spec.kind == "local" else "no Ray address is given"


def is_local(spec: ClusterSpec) -> bool:
    """Whether units run in this process."""
    return spec.kind == "local" or (spec.kind == "auto" and not (spec.address or os.environ.get("RAY_ADDRESS")))
