"""Findings, and the checkpoint as the checks see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import CONTAINERS
from loaders.rules.defaults import LINEAR
from loaders.specs import WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.sources import Sources

SHOWN = 4  # names that a finding lists before it counts the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem that an engine will have with a checkpoint: what it is, what happens then, and what to do.

    `loads_in` names another engine, or another version, that has no such problem.
    """

    level: Literal["fault", "warning"]
    engine: str
    what: str
    happens: str
    remedy: str
    loads_in: str = ""

    @property
    def is_fatal(self) -> bool:
        """Whether no engine of such checkpoints is known to load it, and to compute what it should."""
        return self.level == "fault" and not self.loads_in

    @property
    def warning(self) -> str:
        """The finding in one sentence, as a plan warns of it."""
        return f"{self.what}: {self.engine} {self.happens}; {self.remedy}"

    def __str__(self) -> str:
        return f"{self.level}: {self.what}; {self.engine}: {self.happens}; {self.remedy}"


def fault(engine: str, what: str, happens: str, remedy: str, loads_in: str = "") -> Finding:
    """Return a finding that the engine fails, or computes something else."""
    return Finding(level="fault", engine=engine, what=what, happens=happens, remedy=remedy, loads_in=loads_in)


def warning(engine: str, what: str, happens: str, remedy: str) -> Finding:
    """Return a finding that the engine may fail, or may compute something else."""
    return Finding(level="warning", engine=engine, what=what, happens=happens, remedy=remedy)


@dataclass(frozen=True)
class Subject:
    """A checkpoint under examination."""

    checkpoint: Checkpoint
    sources: Sources
    index: Mapping[str, Any] | None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def wants_index(self) -> bool:
        """Whether engines find several files of this container by an index."""
        return CONTAINERS[self.checkpoint.container].index is not None

    @property
    def by_name(self) -> dict[str, WeightSpec]:
        return {spec.name: spec for spec in self.checkpoint.weights}

    @property
    def linears(self) -> list[LogicalTensor]:
        """The matrices of modules that engines quantize: linear layers, experts, the head."""
        return [r for r in self.sources.tensors if r.role in (*LINEAR, "expert", "head") and len(r.shape) == 2]


def module(tensor: LogicalTensor) -> str:
    """Return the name of the module to which a weight belongs."""
    return tensor.name.removesuffix(".weight")


def some(names: list[str]) -> str:
    """Return the first few of many names as text."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
