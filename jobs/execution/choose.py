"""The choice of a cluster: this process, or Ray. The work of a unit is the same on both."""

from __future__ import annotations

import os

from jobs.execution.cluster import Cluster, LocalCluster
from jobs.spec.cluster import ClusterSpec
from loaders.errors import BadSpec
from loaders.missing import absent, not_installed


def choose(spec: ClusterSpec) -> tuple[Cluster, str]:
    """Return the cluster that the settings ask for, and the reason if the choice was left open (else "")."""
    address = spec.address or os.environ.get("RAY_ADDRESS")
    if not is_local(spec):
        from jobs.execution.ray.cluster import RayCluster

        why = "" if spec.kind == "ray" else f"an address is given ({address})"
        return RayCluster(spec, address), why
    return LocalCluster(spec), "" if spec.kind == "local" else "no Ray address is given"


def check_cluster(spec: ClusterSpec) -> None:
    """Check that Ray is installed if units run there, and that no setting of its machines is given if they do not.

    Raises:
        MissingLibrary: it is not installed.
        BadSpec: there is such a setting.
    """
    if is_local(spec) and (given := spec.only_on_ray):
        raise BadSpec(
            f"cluster.{given[0]}: it is of Ray's machines, and units run in this process; give cluster=ray or"
            " cluster.address"
        )
    if is_local(spec) or not (lacks := absent("ray")):
        return
    named = "cluster.address" if spec.address else "RAY_ADDRESS in the environment"
    what = "cluster=ray" if spec.kind == "ray" else f"cluster=auto with {named}"
    raise not_installed(what, lacks, "cluster=local runs in this process")


def is_joined(spec: ClusterSpec) -> bool:
    """Whether units run on a Ray cluster that is there already."""
    return not is_local(spec) and bool(spec.address or os.environ.get("RAY_ADDRESS"))


def is_local(spec: ClusterSpec) -> bool:
    """Whether units run in this process."""
    return spec.kind == "local" or (spec.kind == "auto" and not (spec.address or os.environ.get("RAY_ADDRESS")))
