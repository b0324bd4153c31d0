"""What a finding is, and what the checks look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.rules.defaults import LINEAR
from loaders.specs import WeightSpec
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.sources import Sources

SHOWN = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """Something an engine will stumble over."""

    level: Literal["fault", "doubt"]
    engine: str
    what: str
    happens: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level}: {self.what}; {self.engine}: {self.happens}; {self.remedy}"


def fault(engine: str, what: str, happens: str, remedy: str) -> Finding:
    """The engine fails, or computes something else."""
    return Finding("fault", engine, what, happens, remedy)


def doubt(engine: str, what: str, happens: str, remedy: str) -> Finding:
    """It may."""
    return Finding("doubt", engine, what, happens, remedy)


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
    def by_name(self) -> dict[str, WeightSpec]:
        return {spec.name: spec for spec in self.checkpoint.weights}

    @property
    def linears(self) -> list[LogicalTensor]:
        """Matrices of modules that engines quantize: linear layers, experts, the head."""
        return [r for r in self.sources.tensors if r.role in (*LINEAR, "expert", "head") and len(r.shape) == 2]


def module(tensor: LogicalTensor) -> str:
    """The module that a weight belongs to."""
    return tensor.name.removesuffix(".weight")


def some(names: list[str]) -> str:
    """A few of many names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
