"""In place of Ray: machines that are a list, and questions to them that are answered in this process."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from jobs.execution.ray.asking import look_remotely
from jobs.output.journal import Journal
from loaders.storage.address import Address
from loaders.storage.base import Entry

GB = 1e9


def node(name: str, cpus: float = 4, memory_gb: float = 16, *, alive: bool = True, **more: Any) -> dict[str, Any]:
    """A row of `ray.nodes()`; `more` has custom resources, and `labels`. Its id is its name."""
    labels = more.pop("labels", {})
    resources = {"CPU": float(cpus), "memory": memory_gb * GB, **more}
    return {"NodeID": name, "NodeManagerHostname": name, "Alive": alive, "Resources": resources, "Labels": labels}


@dataclass(frozen=True)
class FakeTask:
    """A `Task` of which only what is placed and asked for is there."""

    number: int = 0
    memory_bytes: int = int(1e9)
    gpus: int = 0
    threads: int = 4
    source: Address = field(default_factory=lambda: Address.of("/"))
    sources: tuple[Entry, ...] = ()
    journals: tuple[Journal, ...] = ()
    scratch_bytes: int = 0
    by_architecture: bool = False
    source_bytes: int = 0  # bytes of the source of its unit

    @property
    def unit(self) -> Any:
        return SimpleNamespace(id=f"unit-{self.number:05d}", sources=self.sources, source_bytes=self.source_bytes)

    def reach(self) -> None:
        pass


class FakeError(Exception):
    """In place of RayError."""


class FakeRay:
    """`answers` has, by machine, what it does in place of the function that it is sent; silent ones never answer."""

    def __init__(self, *nodes: dict[str, Any]) -> None:
        self.rows = list(nodes)
        self.silent: set[str] = set()
        self.answers: dict[str, Callable[..., Any]] = {}
        self.asked: list[str] = []
        self.exceptions = SimpleNamespace(RayError=FakeError)

    def nodes(self) -> list[dict[str, Any]]:
        return list(self.rows)

    def remote(self, function: Any) -> Any:
        assert function is look_remotely
        return self

    def options(self, *, scheduling_strategy: Any, **others: Any) -> Any:
        name = scheduling_strategy.node_id

        def remote(*arguments: Any) -> Any:
            self.asked.append(name)
            return _Sent(name, pickle.loads(pickle.dumps(arguments)))  # as it travels to another process

        return SimpleNamespace(remote=remote)

    def wait(self, sent: Sequence[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [each for each in sent if each.node not in self.silent]
        if len(ready) < num_returns:
            time.sleep(timeout)
        return ready, [each for each in sent if each.node in self.silent]

    def get(self, sent: Any) -> Any:
        return self.answers.get(sent.node, look_remotely)(*sent.arguments)


@dataclass(frozen=True, eq=False)
class _Sent:
    node: str
    arguments: tuple[Any, ...]
