"""In the place of Ray: machines that are slow, freeze or die, in a time of their own.

A submitted task is a list of messages with the times at which they come. Waiting moves the time to the next one.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from jobs.execution.cluster import UnitFailed
from jobs.execution.ray.placement import Spot

BEAT_S = 0.5  # between two messages of progress


class RayError(Exception):
    pass


class GetTimeoutError(RayError):
    pass


class WorkerCrashedError(RayError):
    pass


class OutOfMemoryError(RayError):
    pass


class NodeDiedError(RayError):
    pass


class TaskCancelledError(RayError):
    pass


@dataclass(frozen=True)
class FakeReport:
    unit: str
    node: str
    attempts: int = 1


@dataclass(frozen=True)
class FakeTask:
    """A unit of so many bytes, which kills its worker by some error, or fails by itself."""

    unit: Any
    work_bytes: int
    memory_bytes: int = 1 << 20
    gpus: int = 0
    threads: int = 1
    dies_by: type[RayError] | None = None
    fails: str = ""


def tasks(count: int, size: int = 100, **fields: Any) -> list[FakeTask]:
    def unit(number: int) -> Any:
        tensor = SimpleNamespace(name=f"layers.{number}.weight", source_bytes=size)
        return SimpleNamespace(id=f"unit-{number:06d}", source_bytes=size, tensors=[tensor])

    return [FakeTask(unit(number), size, **fields) for number in range(count)]


@dataclass
class Machine:
    """A machine: how many units run there at once, their bytes a second, and what becomes of it when."""

    slots: int = 1
    rate: float = 100.0
    compiles_s: float = 0.0  # of the first unit there
    frozen_s: float = float("inf")
    workers_freeze_s: float = float("inf")  # those that run then; others work on
    hangs: bool = False  # every unit there, as of a device that does not answer
    dies_s: float = float("inf")
    leaves_s: float = float("inf")  # when the notice is given
    is_short: bool = False
    ran: int = 0


class Stream:
    """The messages of a task that runs units; also the reference of a task that does not."""

    def __init__(self, node: str, began_s: float) -> None:
        self.node = node
        self.began_s = began_s
        self.events: list[tuple[float, Any]] = []
        self.value: Any = None

    def __next__(self) -> Any:
        when, event = self.events.pop(0)
        assert when < float("inf")
        if event is None:
            raise StopIteration
        return event


class FakeRay:
    """The part of Ray that weightmill uses, and the module `time` for it."""

    exceptions = SimpleNamespace(RayError=RayError, GetTimeoutError=GetTimeoutError)

    def __init__(self, **machines: Machine) -> None:
        self.machines = machines
        self.now = 1000.0
        self.began_s = self.now
        self.counts: Counter[str] = Counter()
        self.launched: list[tuple[str, tuple[str, ...], int, float]] = []  # node, units, memory, when
        self.streams: list[Stream] = []
        self._by_name: dict[str, Stream] = {}

    # --- time

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @property
    def passed_s(self) -> float:
        return self.now - self.began_s

    # --- Ray

    def remote(self, function: Any) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(
            remote=lambda *given: getattr(self, f"_{function.__name__}")(options, *given)
        ))  # fmt: skip

    def _run_remotely(self, options: Any, given: Sequence[FakeTask], *_: Any) -> Stream:
        node = options["scheduling_strategy"]
        machine, stream = self.machines[node], Stream(node, self.now)
        when = self.now + 0.1
        self.counts["tasks"] += 1
        self.launched.append((node, tuple(task.unit.id for task in given), options.get("memory", 0), self.passed_s))
        add = stream.events.append
        add((when, [("began", None), ("short", machine.is_short)]))
        if machine.compiles_s and not machine.ran:
            add((when, [("unit", given[0].unit.id), ("compiling", None)]))
            when += machine.compiles_s
        for task in given:
            machine.ran += 1
            message: list[Any] = [("unit", task.unit.id)]
            if machine.hangs:
                add((when, message))
                break
            if task.dies_by is not None:
                add((when, message))
                add((when + 0.1, task.dies_by("it died")))
                break
            left = task.work_bytes
            while left > machine.rate * BEAT_S:
                when += BEAT_S
                step = int(machine.rate * BEAT_S)
                left -= step
                add((when, [*message, ("bytes", step)]))
                message = []
            when += left / machine.rate
            end = UnitFailed(task.unit.id, task.fails) if task.fails else FakeReport(task.unit.id, node)
            add((when, [*message, ("bytes", left), ("outcome", end)]))
        else:
            add((when, None))
        self._by_name[options["name"]] = stream
        self.streams.append(stream)
        self._freeze(stream)
        return stream

    def _freeze(self, stream: Stream) -> None:
        """Take from a stream what never comes."""
        machine = self.machines[stream.node]
        last = min(machine.frozen_s, machine.dies_s)
        if stream.began_s - self.began_s <= machine.workers_freeze_s:
            last = min(last, machine.workers_freeze_s)
        stream.events = [(when, event) for when, event in stream.events if when - self.began_s < last]

    def _ask_remotely(self, options: Any, *_: Any) -> Stream:
        node = options["scheduling_strategy"]
        stream = Stream(node, self.now)
        stream.events = [(self.now + 0.2, "")]
        self.counts["asked"] += 1
        self._freeze(stream)
        return stream

    def _end_remotely(self, options: Any, name: str) -> Stream:
        stream = self._by_name[name]
        self.counts["killed"] += 1
        stream.events = [(self.now + 0.5, WorkerCrashedError("killed"))]
        if self.passed_s > min(self.machines[stream.node].frozen_s, self.machines[stream.node].dies_s):
            stream.events = []
        return Stream(stream.node, self.now)

    def wait(
        self, streams: Sequence[Stream], *, num_returns: int, timeout: float, fetch_local: bool = True
    ) -> tuple[list[Stream], list[Stream]]:
        self.counts["waits"] += 1
        self.counts["looked at"] += len(streams)
        following = heapq.nsmallest(num_returns, (each.events[0][0] for each in streams if each.events))
        target = following[-1] if len(following) == num_returns else float("inf")
        self.now = max(self.now, min(self.now + timeout, target))
        ready = [each for each in streams if each.events and each.events[0][0] <= self.now]
        return ready[:num_returns], []  # nobody looks at the others

    def get(self, found: Any, timeout: float | None = None) -> Any:
        self.counts["messages"] += 1
        if isinstance(found, Stream):
            found = next(found)
        if isinstance(found, Exception):
            raise found
        return found

    def cancel(self, stream: Stream, *, force: bool) -> None:
        self.counts["cancelled"] += 1
        if stream.events and stream.events[0][0] < float("inf"):
            stream.events = [(self.now + 0.1, TaskCancelledError("cancelled"))]
            self._freeze(stream)


@dataclass
class FakePlacement:
    """Places units where most room is."""

    ray: FakeRay
    out_if_asked: Collection[str] = ()
    out: set[str] = field(default_factory=set)
    doubted: list[str] = field(default_factory=list)
    most_memory: int = 1 << 60

    def place(
        self, task: Any, flying: Mapping[str, int], *, without: Collection[str] = (), memory_times: int = 1,
        with_gpu: Mapping[str, int] | None = None, only_free: bool = False,
    ) -> Spot | None:  # fmt: skip
        room = {
            name: machine.slots - flying.get(name, 0)
            for name, machine in self.ray.machines.items()
            if name not in without and name not in self.out
        }
        if task.memory_bytes * memory_times > self.most_memory or max(room.values(), default=0) <= 0:
            return None
        best = max(room, key=lambda name: room[name])
        memory = task.memory_bytes * memory_times
        return Spot(best, best, {"scheduling_strategy": best, "memory": memory})

    def refresh(self, *_: Any) -> None:
        pass

    def is_crowded(self, node: str) -> bool:
        return False

    def hopeless(self) -> str | None:
        return None

    def doubt(self, node: str) -> bool:
        self.doubted.append(node)
        return node in self.out_if_asked

    def is_out(self, node: str) -> bool | None:
        self.out.add(node)
        return True


class FakeWatch:
    """Sees at once what becomes of machines, except that they freeze."""

    available: Mapping[str, Any] = {}

    def __init__(self, ray: FakeRay) -> None:
        self._ray = ray

    @property
    def nodes(self) -> list[dict[str, Any]]:
        dead = self.dead
        return [
            {"NodeID": name, "Alive": name not in dead, "Resources": {"CPU": machine.slots}}
            for name, machine in self._ray.machines.items()
        ]

    @property
    def dead(self) -> dict[str, float]:
        return {name: m.dies_s for name, m in self._ray.machines.items() if m.dies_s < self._ray.passed_s}

    @property
    def leaving(self) -> frozenset[str]:
        return frozenset(name for name, m in self._ray.machines.items() if m.leaves_s < self._ray.passed_s)

    def check(self) -> None:
        pass
