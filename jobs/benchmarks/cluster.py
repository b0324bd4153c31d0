"""`weightmill bench cluster`: what Ray costs a job, beside the same in this process, and its driver for each unit.

Both are measured with a Ray that the benchmark starts here. What it takes to start is told apart: it is the difference
between jobs of the demo model, which hardly work. The units that the driver is timed with do nothing but tell their
outcome, so that there can be many.
"""

from __future__ import annotations

import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from jobs.benchmarks.busy_machine import Busy, machine, warning
from jobs.benchmarks.commands import Ran, job_command, ours, run_command
from jobs.benchmarks.random_llama import given_or_random
from jobs.benchmarks.timing import Case, rotate
from jobs.cli.verb import Said, note
from jobs.execution.choose import choose
from jobs.execution.cluster import UnitFailed
from jobs.output.journal import Journal
from jobs.planning.plan import Unit
from jobs.report.tables import size, table
from jobs.spec.cluster import ClusterSpec
from loaders.backends.memory import anonymous_bytes
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import StorageError
from loaders.places import DEMO
from loaders.storage.address import Address
from loaders.storage.hashes import hash_file

HERE, RAY = "cluster=local", "cluster=ray"
LOOKS = 10  # at the driver's memory, while units run


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyTask:
    """A `Task` that does nothing, as small as one can be."""

    unit: Unit
    threads: int = 1
    source: Address = Address(str(DEMO))  # noqa: RUF009  # an immutable value
    memory_bytes: int = 0
    work_bytes: int = 1
    gpus: int = 0
    scratch_bytes: int = 0
    journals: tuple[Journal, ...] = ()
    by_architecture: bool = False

    def reach(self) -> None:
        """Any machine can do nothing."""

    def run(self, on_bytes: Callable[[int], None], stop: threading.Event) -> EmptyReport:
        on_bytes(1)
        return EmptyReport(self.unit.id)


@dataclass(frozen=True, slots=True)
class EmptyReport:
    """What such a task tells."""

    unit: str
    attempts: int = 1


def time_cluster(path: str | None, gb: float, quant: str, units: int, folder: str | None, repeats: int) -> Said:
    """Time a job on Ray and in this process, in turn, and the driver over empty units.

    Raises:
        StorageError: Ray does not start, or a job failed.
    """
    busy = Busy()
    with given_or_random(path, gb, folder) as (work, source):
        checkpoint = open_checkpoint(source)
        files = [source / tag.name for tag in checkpoint.files]
        parts: tuple[tuple[str, Path, list[Path]], ...] = (("start", DEMO, []), ("job", source, files))
        jobs = {
            f"{name} {how}": _Timed(where, quant, how, work, mine) for name, where, mine in parts for how in (HERE, RAY)
        }
        note("first jobs on the demo, which compile kernels; they are kept")
        for how in (HERE, RAY):
            jobs[f"start {how}"]()
        note(f"timing jobs of {size(checkpoint.size)} here and on Ray, {repeats} laps each")
        rotate([Case(name, job) for name, job in jobs.items()], repeats, warm_up=0)
        rows = {name: statistics.median(job.seconds) for name, job in jobs.items() if job.seconds}
        if len(rows) < len(jobs):
            raise StorageError(f"bench: a job failed: {', '.join(name for name in jobs if name not in rows)}")
    driver = time_driver(units)
    return _said(jobs, checkpoint.size, driver, busy, quant)


class _Timed:
    """A job as a command; called once for each lap, it gives its seconds."""

    def __init__(self, source: Path, quant: str, how: str, work: Path, files: list[Path]) -> None:
        self._command = job_command(source, [quant], f"output.path={work / 'output'}", cluster=how)
        self._output, self._files = work / "output", files
        self.seconds: list[float] = []

    def __call__(self) -> float:
        for file in self._files:  # into the page cache
            hash_file(file)
        try:
            ran: Ran = run_command(self._command, ours())
        finally:
            shutil.rmtree(self._output, ignore_errors=True)
        self.seconds.append(ran.seconds)
        assert json.loads(ran.said)["status"] == "done"
        return ran.seconds


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What the driver took over many units: its CPU and the wall's milliseconds for each, and its memory on the way."""

    units: int
    cpu_ms: float
    wall_ms: float
    memory: tuple[int, ...]  # anonymous bytes, after each tenth of the units


def time_driver(units: int) -> Driver:
    """Run empty units on Ray, and return what this process took.

    Raises:
        StorageError: Ray does not start, or a unit failed.
    """
    note(f"starting Ray, and running {units:,} empty units")
    cluster, _ = choose(ClusterSpec(kind="ray"))
    try:
        tasks = [EmptyTask(unit=Unit(f"unit-{n:06d}", (), (), {})) for n in range(units)]
        cluster.check(tasks)
        assert not any(task.unit.source_bytes for task in tasks)  # which units keep: memory of theirs, not the driver's
        _finish(cluster.run(tasks[:1], lambda count: None))  # workers have started then
        taken, cpu_s, began = list[int](), time.process_time(), time.perf_counter()
        for done, outcome in enumerate(cluster.run(tasks, lambda count: None), 1):
            if isinstance(outcome, UnitFailed):
                raise StorageError(f"bench: {outcome.unit}: {outcome.reason}")
            if done * LOOKS // units > len(taken):
                taken.append(anonymous_bytes())
        seconds = time.perf_counter() - began
        return Driver(
            units=units, cpu_ms=(time.process_time() - cpu_s) / units * 1e3, wall_ms=seconds / units * 1e3,
            memory=tuple(taken),
        )  # fmt: skip
    finally:
        cluster.close()


def _finish(outcomes: Iterator[Any]) -> None:
    for _ in outcomes:
        pass


def _said(jobs: dict[str, _Timed], total: int, driver: Driver, busy: Busy, quant: str) -> Said:
    medians = {name: statistics.median(job.seconds) for name, job in jobs.items()}
    start_s = medians[f"start {RAY}"] - medians[f"start {HERE}"]
    ratio = (medians[f"job {RAY}"] - start_s) / medians[f"job {HERE}"]
    shown = table("a job as a command", "median s", "of all laps", right=("median s",))
    words = {"start": "demo", "job": size(total)}
    for name, job in jobs.items():
        kind, how = name.split()
        where = "on Ray" if how == RAY else "in this process"
        laps = " ".join(f"{each:.2f}" for each in sorted(job.seconds))
        shown.add_row(f"{words[kind]}, {where}", f"{medians[name]:.2f}", laps)
    first, last = driver.memory[0], driver.memory[-1]
    here, taken = machine(), busy.document()
    said = warning(taken)
    text = Group(
        f"{here}; {quant} of {size(total)}",
        shown,
        f"the start of Ray: {start_s:.1f} s; the job beside that: {ratio:.2f} times as long as in this process",
        f"the driver, over {driver.units:,} empty units: {driver.cpu_ms:.2f} ms of CPU and {driver.wall_ms:.2f} ms a"
        f" unit; its memory {size(first)} after a tenth, {size(last)} after all",
        *([] if said is None else [Text(said, style="yellow")]),
    )
    document = {
        "status": "done", "machine": here, "busy": taken, "bytes": total, "quant": quant,
        "seconds": {name: job.seconds for name, job in jobs.items()}, "start_s": start_s, "times_local": ratio,
        "units": driver.units, "driver_cpu_ms": driver.cpu_ms, "driver_wall_ms": driver.wall_ms,
        "driver_memory_bytes": list(driver.memory),
    }  # fmt: skip
    return Said(document, text)
