"""How long a planned job takes on machines that are not there: `weightmill plan cluster.nodes=64`.

What this machine can measure in a few seconds is measured: how fast its CPUs encode the job's schemes, copy and hash.
The rest is taken from the settings, or assumed; the document names which is which.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jobs.execution.joining import MOVES_AT_ONCE
from jobs.execution.ray.machines import BASE_BYTES, MOST_THREADS
from jobs.orchestration.preflight import Planned
from jobs.planning.plan import Placement, Unit
from jobs.planning.reckoning import Fixed, Load, Machines, Reckoned, reckon
from jobs.planning.targets import TARGET
from jobs.spec.planned_cluster import PlannedCluster
from loaders.backends.fastest import encoded
from loaders.backends.machine import usable_cpus
from loaders.dtypes import WEIGHT_DTYPES
from loaders.errors import BadSpec
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.plain import Plain
from loaders.storage.hashes import digest

# What is assumed of a machine of which the settings do not say it: a network of 10 Gbit/s.
GBPS = 1.0
# As measured with Ray 2.60: a cluster is joined and its machines are asked; a worker imports libraries and kernels.
START_S, WORKER_CPU_S = 4.0, 1.5
UNIT_S = 0.1  # the file and the record of a unit are synced, and Ray sends the next one
DRIVER_S = 0.002  # what `weightmill bench cluster` holds the driver to
END_S = 1.0  # index, config, report and page
MEASURING_S = 2.0  # after which no further scheme is measured
BLOCK, LAPS = 64 << 20, 3  # bytes that are written, read and hashed to measure these: more than caches hold
From = Literal["measured here", "given", "assumed"]


@dataclass(frozen=True, slots=True)
class Rate:
    """A number that the reckoning takes, and where it is from."""

    what: str
    value: float
    unit: str
    taken: From


@dataclass(frozen=True, kw_only=True)
class ClusterTime:
    """A planned job on so many machines, and what it was reckoned from."""

    machines: Machines
    reckoned: Reckoned
    rates: tuple[Rate, ...]
    units: int
    read: float  # bytes by all machines
    written: float
    notes: tuple[str, ...] = ()


@dataclass
class _Found:
    """The rates that were found so far, by what they are of."""

    rates: list[Rate] = field(default_factory=list)

    def add(self, what: str, value: float, unit: str, taken: From) -> float:
        self.rates.append(Rate(what, value, unit, taken))
        return value

    def given_or(self, what: str, value: float | None, otherwise: float, unit: str, taken: From = "assumed") -> float:
        return self.add(what, otherwise if value is None else value, unit, taken if value is None else "given")


def cluster_time(planned: Planned, cluster: PlannedCluster) -> ClusterTime:
    """Reckon a job on the machines of the settings. Kernels are measured for some seconds, and compiled before that.

    Raises:
        BadSpec: a unit does not fit on such a machine.
    """
    assert cluster.nodes is not None
    node, found, units = cluster.node, _Found(), planned.plan.units
    cpus = found.given_or("CPUs of a machine", node.cpus, usable_cpus(), "", "measured here")
    read = found.given_or("a machine reads", node.read_gbps, GBPS, "GB/s")
    write = found.given_or("a machine writes", node.write_gbps, GBPS, "GB/s")
    threads = cluster.threads or max(1, min(int(cpus), MOST_THREADS))
    at_once = _units_at_once(planned, cluster, cpus, threads)
    seconds = _seconds(planned, found)
    written, again, hashed = _moving()
    found.add("a CPU hands to the kernel", written / 1e9, "GB/s", "measured here")
    found.add("a CPU takes from the kernel", again / 1e9, "GB/s", "measured here")
    found.add("a CPU hashes", hashed / 1e9, "GB/s", "measured here")
    # What is written is hashed on its way, then read back and hashed again.
    moved = (1 / again, 1 / written + 1 / again + 2 / hashed)
    loads = [_load(unit, seconds, moved) for unit in units]
    fixed = Fixed(
        start_s=found.add("Ray is joined", START_S, "s", "assumed")
        + found.add("a worker starts, on one CPU", WORKER_CPU_S, "s", "assumed") / min(1.0, cpus),
        unit_s=found.add("a unit is sent, synced and recorded", UNIT_S, "s", "assumed"),
        driver_s=found.add("the driver, for each unit", DRIVER_S, "s", "assumed"),
        end_s=found.add("the end: report, index, config", END_S, "s", "assumed")
        + _joining_s(planned, cluster.nodes, read, write),
    )
    limit = math.inf if cluster.read_limit is None else cluster.read_limit / cluster.nodes
    machines = Machines(
        count=cluster.nodes, units_at_once=at_once, threads=threads, cpus=cpus, read_rate=min(read * 1e9, limit),
        write_rate=write * 1e9,
    )  # fmt: skip
    return ClusterTime(
        machines=machines, reckoned=reckon(loads, machines, fixed), rates=tuple(found.rates), units=len(units),
        read=sum(load.read for load in loads), written=sum(load.written for load in loads),
        notes=tuple(_notes(planned)),
    )  # fmt: skip


def _units_at_once(planned: Planned, cluster: PlannedCluster, cpus: float, threads: int) -> int:
    """Return how many units a machine has at once, as the placement on a cluster does.

    Raises:
        BadSpec: not one fits.
    """
    node, (strategy, _) = cluster.node, planned.strategy
    need = BASE_BYTES + max(unit.memory_bytes(threads) for unit in planned.plan.units) + strategy.held_bytes
    rooms = [max(1, int(cpus // threads))]
    rooms += [] if cluster.units_per_node is None else [cluster.units_per_node]
    # Of so few in all, machines are given alike.
    rooms += [] if cluster.units_at_once is None else [max(1, -(-cluster.units_at_once // (cluster.nodes or 1)))]
    if node.memory_gb is not None:
        rooms.append(int(node.memory_gb * 1e9 // need))
    if planned.spec.backend.kind == "cuda":
        rooms.append(node.gpus)
    if min(rooms) < 1:
        lacks = f"{need / 1e9:.2f} GB of memory" if planned.spec.backend.kind != "cuda" or node.gpus else "a GPU"
        raise BadSpec(f"cluster.node: a unit of {threads} threads needs {lacks}, which such a machine has not")
    return min(rooms)


# --- rates


def _of(placement: Placement) -> tuple[Scheme, str]:
    """Return what decides how fast a tensor is encoded: its scheme, and the dtype that the scheme gets."""
    encoding = placement.encoding
    dtype = encoding.spec.dtype.name
    return (encoding.scheme, dtype) if dtype in WEIGHT_DTYPES else (Plain(), "BF16")


def _placements(units: Sequence[Unit]) -> Iterator[Placement]:
    return (placement for unit in units for placement in unit.outputs[TARGET].placements)


def _seconds(planned: Planned, found: _Found) -> dict[tuple[Scheme, str], float]:
    """Return the seconds in which one CPU, or the backend for each of a unit's threads, encodes and measures a byte."""
    sizes = Counter[tuple[Scheme, str]]()
    for placement in _placements(planned.plan.units):
        sizes[_of(placement)] += placement.encoding.spec.size
    began, made, threads = time.perf_counter(), dict[tuple[Scheme, str], float](), usable_cpus()
    for (scheme, dtype), _ in sizes.most_common():
        backend = planned.spec.backend.asked if planned.spec.backend.asked in scheme.backends else "cpu"
        name = planned.spec.quant.name if scheme == planned.spec.quant.scheme else scheme.kind
        is_plain = isinstance(scheme, Plain)
        what = f"a CPU copies {dtype} and compares" if is_plain else f"a CPU encodes {dtype} as {name}"
        if made and time.perf_counter() - began > MEASURING_S:
            slowest = max(made.values())
            made[scheme, dtype] = 1e-9 / found.add(what, 1e-9 / slowest, "GB/s", "assumed")
            continue
        taken: From = "measured here"
        try:
            by = encoded(backend, scheme, dtype, threads)  # type: ignore[arg-type]
        except BadSpec:  # a GPU's, of which there is none here
            by, taken = encoded("cpu", scheme, dtype, threads), "assumed"  # type: ignore[arg-type]
        rate = by.cpu_rate if backend == "cpu" or taken == "assumed" else by.rate / threads
        made[scheme, dtype] = 1e-9 / found.add(what, rate / 1e9, "GB/s", taken)
    return made


def _moving() -> tuple[float, float, float]:
    """Return the bytes a second that a CPU writes to the kernel's cache of files, reads from it, and hashes."""
    block, taken = np.ones(BLOCK, np.uint8), list[tuple[float, float, float]]()
    for _ in range(LAPS):
        with tempfile.TemporaryFile() as file:  # what is not synced does not reach the disk
            began = time.thread_time()
            file.write(block.data)
            file.flush()
            wrote = time.thread_time()
            file.seek(0)
            file.readinto(block.data)
            read = time.thread_time()
            digest(block)
            taken.append((wrote - began, read - wrote, time.thread_time() - read))
    written, read_back, hashed = (BLOCK / max(1e-6, min(column)) for column in zip(*taken, strict=True))
    return written, read_back, hashed


def _load(unit: Unit, seconds: dict[tuple[Scheme, str], float], moved: tuple[float, float]) -> Load:
    output = unit.outputs[TARGET]
    written = sum(file.size for file in output.files)
    encoding_s = sum(seconds[_of(p)] * p.encoding.spec.size for p in output.placements)
    return Load(unit.source_bytes, encoding_s + unit.source_bytes * moved[0] + written * moved[1], written)


def _joining_s(planned: Planned, nodes: int, read: float, write: float) -> float:
    """Return the seconds in which a file that units share is joined: machines copy its pieces, and one reads it."""
    size = sum(piece.size for piece in planned.target.pieces) / 1e9
    movers = min(nodes, MOVES_AT_ONCE)
    moves = (size / read + size / write) / movers if planned.journal.destination.is_local else 0.0
    return moves + size / read


def _notes(planned: Planned) -> Iterator[str]:
    if any(tensor.decode is not None for tensor in planned.plan.sources.tensors):
        yield "decoding the source's own quantization is not reckoned with"
    if planned.judging is not None:
        yield f"verify={planned.spec.verify.kind} comes after that, on one machine, and is not reckoned with"
    largest = max(unit.source_bytes for unit in planned.plan.units)
    mean = planned.plan.source_bytes / len(planned.plan.units)
    if largest > 4 * mean and not math.isclose(largest, mean):
        yield f"the largest unit is {largest / mean:.0f} times the mean one"
