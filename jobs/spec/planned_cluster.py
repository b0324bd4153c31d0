"""The cluster that `plan` reckons with: machines that need not be there."""

from __future__ import annotations

from pydantic import Field, model_validator

from jobs.spec.base import Spec
from jobs.spec.cluster import ClusterSpec


class NodeSpec(Spec):
    """A machine of the reckoned cluster; what is not given is assumed, and named among what is assumed."""

    cpus: float | None = Field(default=None, gt=0, description="its CPUs; null: those of this machine")
    read_gbps: float | None = Field(default=None, gt=0, description="GB/s (1e9 bytes) that it reads of the source")
    write_gbps: float | None = Field(default=None, gt=0, description="GB/s that it writes, or uploads")
    memory_gb: float | None = Field(default=None, gt=0, description="its memory in GB; null: enough")
    gpus: int = Field(default=0, ge=0, description="its GPUs, for backend=cuda")


class PlannedCluster(ClusterSpec):
    """conf/cluster, and the machines that `plan` reckons with."""

    nodes: int | None = Field(
        default=None, ge=1, le=100_000, description="say how long so many machines take, and what binds them"
    )
    node: NodeSpec = Field(
        default_factory=NodeSpec, description="each of them: {cpus: 32, read_gbps: 3, write_gbps: 1, memory_gb: 128}"
    )

    @model_validator(mode="after")
    def _machines_are_counted(self) -> PlannedCluster:
        if self.nodes is None and self.node != NodeSpec():
            raise ValueError("node is what each of nodes has; give nodes as well, such as nodes=8")
        return self
