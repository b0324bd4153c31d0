"""The settings of what units run on: this process, or the machines of a Ray cluster."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from jobs.spec.base import Spec

BUILT_IN = ("CPU", "GPU", "memory", "object_store_memory")  # Ray's own resources
RETRIES = 3  # enough for preempted machines, and few enough that a unit which kills its workers fails soon
ONLY_ON_RAY: dict[str, Any] = {"units_per_node": None, "retries": RETRIES, "resources": {}, "labels": {}, "wait_s": 0}


class ClusterSpec(Spec):
    """conf/cluster: the processes or machines on which units run."""

    kind: Literal["auto", "local", "ray"]
    address: str | None = Field(default=None, description="the Ray cluster to join; null starts one here")
    threads: int | None = Field(
        default=None, ge=1, description="threads of this process, or of a unit on Ray; by default all CPUs"
    )
    units_at_once: int | None = Field(
        default=None, ge=1, description="units in flight; by default from the number of CPUs"
    )
    ship_code: bool = Field(default=True, description="send weightmill to a joined cluster's workers")
    units_per_node: int | None = Field(
        default=None, ge=1, description="units at once on one machine, at most; null: what its CPUs and GPUs hold"
    )
    read_limit_gbps: float | None = Field(
        default=None, gt=0, description="gigabytes (1e9 bytes) a second that all units together read from the source"
    )
    retries: int = Field(default=RETRIES, ge=0, description="deaths of its worker after which a unit is tried again")
    resources: dict[str, float] = Field(
        default_factory=dict, description="Ray's custom resources that a unit requests, such as {nvme: 1}"
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray's labels of the machines that may work, such as {zone: a}"
    )
    wait_s: float = Field(
        default=0, ge=0, description="seconds to wait for machines that fit; a cluster that scales is asked for them"
    )

    @field_validator("resources")
    @classmethod
    def _resources_are_custom(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in BUILT_IN:
                raise ValueError(
                    f"expected custom resources, found {name}: threads, backend and unit_mb decide about it"
                )
            if amount <= 0 or (amount > 1 and amount != int(amount)):
                raise ValueError(f"{name}: expected a whole number, or a part of 1, found {amount:g}")
        return resources

    # Jobs of a sweep are grouped by it, and a dict has no hash.
    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def read_limit(self) -> float | None:
        """The most bytes a second that all units together read; None: no limit."""
        return None if self.read_limit_gbps is None else self.read_limit_gbps * 1e9

    @property
    def only_on_ray(self) -> tuple[str, ...]:
        """The settings that were given and are of Ray's machines."""
        return tuple(name for name, default in ONLY_ON_RAY.items() if getattr(self, name) != default)
