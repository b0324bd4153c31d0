"""How attempts at units die, what that says of the unit, and when it is given up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.execution.cluster import Task
from jobs.execution.ray.flights import Flight, said_by_ray
from jobs.execution.ray.machines import memory_bytes

# memory: killed for it, or on a machine that was short of it. crash: another death of the worker. gone: the machine is
# gone. stuck: no progress. away: the unit did not begin, which says nothing of it. fault: it will not be better.
Kind = Literal["memory", "crash", "gone", "stuck", "away", "fault"]
MEMORY_TIMES = (1, 2, 4)  # the request of memory, as a multiple of the plan's: it is doubled twice
MOST_GONE = 3  # machines that may vanish with one unit
REFUSED = ("TaskUnschedulableError", "LocalRayletDiedError", "TaskPlacementGroupRemoved")
# Errors of a worker that had the unit, also where it died before anything was heard of it.
FELL = ("OutOfMemoryError", "RuntimeEnvSetupError", "WorkerCrashedError", "")
CRASHED = ("WorkerCrashedError", "TaskCancelledError", "RaySystemError")


@dataclass(frozen=True)
class Cause:
    """Why a flight ended without an outcome, and the words for it."""

    kind: Kind
    words: str


def cause_of(flight: Flight, error: Exception | None) -> Cause:
    """Say why a flight ended, by Ray's error; None stands for a stream that ended before its time."""
    name = "" if error is None else type(error).__name__
    if name in REFUSED or (not flight.has_begun and name not in FELL):
        return Cause("away", "its machine took no work")
    if name == "OutOfMemoryError":
        return Cause("memory", "its worker was killed for memory")
    if name == "NodeDiedError":
        return gone(flight)
    if error is None or name in CRASHED:
        if flight.is_short:
            return Cause("memory", "its worker died while the machine was short of memory")
        if flight.is_stuck:
            return Cause("stuck", "it made no progress")
        return Cause("crash", "its worker died")
    return Cause("fault", said_by_ray(error))


def gone(flight: Flight) -> Cause:
    """The cause of a flight's end whose machine is gone."""
    if flight.is_short:
        return Cause("memory", "its machine went away while it was short of memory")
    return Cause("gone", "its machine went away")


@dataclass(slots=True)
class Effort:
    """All attempts at one unit: those that fly, and how others died."""

    task: Task[Any]
    flights: list[Flight] = field(default_factory=list)
    counted: int = 0  # bytes that the progress has of it: the most of any attempt
    deaths: list[tuple[Cause, str]] = field(default_factory=list)  # with the machine's name
    failed_on: set[str] = field(default_factory=set)  # machines, by Ray's id
    failure: str = ""  # an attempt's own words; another one flies on
    repeats: int = 0  # attempts after the first

    def _count(self, kind: Kind) -> int:
        return sum(cause.kind == kind for cause, _ in self.deaths)

    @property
    def memory_times(self) -> int:
        return MEMORY_TIMES[min(self._count("memory"), len(MEMORY_TIMES) - 1)]

    def died(self, cause: Cause, flight: Flight) -> None:
        if cause.kind != "away":
            self.deaths.append((cause, flight.spot.name))
            self.failed_on.add(flight.spot.node)

    def is_hopeless(self, retries: int) -> bool:
        """Whether the unit is given up, of whose worker `retries` deaths are allowed."""
        return (
            self._count("memory") >= len(MEMORY_TIMES)
            or self._count("gone") >= MOST_GONE
            or self._count("crash") + self._count("stuck") > retries
            or self._count("fault") > 0
        )

    @property
    def words(self) -> str:
        """Why the unit was given up: how its attempts died and where, what it needs, and what to do."""
        last = self.deaths[-1][0]
        if last.kind == "fault":
            return last.words
        often = ", then ".join(f"{cause.words} ({node})" for cause, node in self.deaths)
        return f"{often}; {_needs(self.task, self.memory_times)}; {_REMEDIES[last.kind]}"


_REMEDIES: dict[Kind, str] = {
    "memory": "give fewer cluster.threads, a smaller unit_mb, or machines with more memory",
    "gone": "look at those machines' memory and logs; cluster.units_per_node=1 leaves each unit more",
    "crash": "look at the logs of Ray's workers there; cluster.retries allows more deaths",
    "stuck": "look at those machines' disks, mounts and devices",
}


def _needs(task: Task[Any], times: int) -> str:
    largest = max(task.unit.tensors, key=lambda tensor: tensor.source_bytes, default=None)
    asked = f"it asked for {memory_bytes(task) * times / 1e9:.2f} GB"
    if largest is None:
        return asked
    return f"{asked}, and its largest tensor is {largest.name} with {largest.source_bytes / 1e6:.1f} MB"
