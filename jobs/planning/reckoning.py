"""How long units take on machines that need not be there: a reckoning from rates. Pure functions.

Machines are alike, and take units one after another in the order of the plan, as a job's machines do. A unit reads and
computes at once, then writes; the units of one machine share what it reads, computes and writes. What that leaves out:
machines that die or wait for others, and a store that gives less when many ask.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# The parts of the time that can bind a job, and what each is called.
Part = Literal["reading", "cpu", "writing", "tail", "driver", "start", "end"]


@dataclass(frozen=True, slots=True)
class Load:
    """What a unit takes: bytes read and written, and seconds of one CPU."""

    read: float
    cpu_s: float
    written: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Machines that are alike: how many, how many units each has at once, its CPUs, and bytes a second."""

    count: int
    units_at_once: int
    threads: int  # of a unit
    cpus: float
    read_rate: float
    write_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """Seconds beside the work of units."""

    start_s: float  # until the first unit begins, and what every process does before its first one
    unit_s: float  # of each unit, on its machine: it is sent, files are synced and renamed, a record is written
    driver_s: float  # of each unit, on the driver, which has all of them
    end_s: float  # what follows the last unit: the report, and the joining of a file that units share


@dataclass(frozen=True, slots=True, kw_only=True)
class Reckoned:
    """The result: seconds in all and by part, and the bytes of the machine that has most and least."""

    seconds: float
    parts: dict[Part, float]
    read: tuple[float, float]  # by machine: the least and the most
    written: tuple[float, float]
    slowest_unit_s: float

    @property
    def bottleneck(self) -> Part:
        return max(self.parts, key=self.parts.__getitem__)


def reckon(loads: Sequence[Load], machines: Machines, fixed: Fixed) -> Reckoned:
    """Return how long the units take.

    The parts do not add up to `seconds`: reading, computing and writing overlap. Each says how long it would take if
    all machines did nothing else all the time; "tail" is the time that machines wait for others' last units, in the
    mean of all places for a unit.
    """
    side, count = machines.units_at_once, machines.count
    cpus = min(machines.threads, machines.cpus / side)
    free = [(0.0, place) for place in range(count * side)]
    read, written = [0.0] * count, [0.0] * count
    busy_s, end_s, slowest = 0.0, 0.0, 0.0
    for load in loads:
        at, place = heapq.heappop(free)
        reading, writing = load.read / machines.read_rate, load.written / machines.write_rate
        alone = max(reading, load.cpu_s / cpus) + writing
        took = max(alone, side * reading, side * writing) + fixed.unit_s
        heapq.heappush(free, (at + took, place))
        read[place % count] += load.read
        written[place % count] += load.written
        busy_s, end_s, slowest = busy_s + took, max(end_s, at + took), max(slowest, took)
    driver_s = fixed.driver_s * len(loads)
    total = [sum(column) for column in zip(*((x.read, x.cpu_s, x.written) for x in loads), strict=True)] or [0.0] * 3
    parts: dict[Part, float] = {
        "reading": total[0] / (machines.read_rate * count),
        "cpu": total[1] / (cpus * side * count),
        "writing": total[2] / (machines.write_rate * count),
        "tail": end_s - busy_s / len(free),
        "driver": driver_s,
        "start": fixed.start_s,
        "end": fixed.end_s,
    }
    return Reckoned(
        seconds=fixed.start_s + max(end_s, driver_s) + fixed.end_s, parts=parts, read=(min(read), max(read)),
        written=(min(written), max(written)), slowest_unit_s=slowest,
    )  # fmt: skip
