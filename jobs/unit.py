"""One unit: read its tensors once, and for each target encode, measure, finish the file, leave a record.

The same function runs on a thread of this process and in a Ray task; it knows of neither. Tensors of a few MiB run
side by side, a thread each; large ones one after another, on all of the unit's threads.
"""

from __future__ import annotations

import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jobs.journal import Journal, Record, TensorRecord, Written
from jobs.parts import Measured, PartFiles, TensorPart, Timer
from jobs.planning import Placement, Unit
from jobs.targets import TargetId
from loaders.backends import leased_kernels
from loaders.errors import StorageError, VerifyFailed
from loaders.memory import PeakMemory
from loaders.quantization.gate import Gate
from loaders.quantization.measure import measure
from loaders.quantization.scheme import Block, Scheme, Sharing, View
from loaders.recipes import Recipe
from loaders.stats import ErrorSums, LoadStats
from loaders.strategies import Reader, WeightLoader
from loaders.strategies.base import by_warmth, cached_share
from loaders.views import encoded_view, numbers_view, ordered_view, view_of
from loaders.work import RANGE, ThreadedWork

SMALL = 4 * RANGE  # bytes of source up to which a tensor stays on one thread
Finished = tuple[tuple[Written, ...], tuple[TensorRecord, ...]]


@dataclass(frozen=True, slots=True)
class UnitTask:
    """Everything a worker needs to run a unit: small, and only paths."""

    unit: Unit
    root: Path
    journals: Mapping[TargetId, tuple[Path, str]]  # (output, key)
    strategy: WeightLoader
    backend: str
    threads: int
    gate: Gate
    in_place: bool = False  # pieces go into the file they are ranges of, which is there: for one process only

    @property
    def memory_bytes(self) -> int:
        """What running it holds at most, beyond the libraries."""
        return self.unit.memory_bytes(self.threads) + self.strategy.held_bytes

    @property
    def gpus(self) -> int:
        """GPUs that a cluster must set aside for it."""
        return int(self.backend == "cuda")

    def run(self, on_bytes: Callable[[int], None], stop: threading.Event) -> UnitReport:
        return run_unit(self, on_bytes, stop)


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What came of an attempt: a record for each target that is done, the reason for each that failed."""

    unit: str
    records: Mapping[TargetId, Record]
    failures: Mapping[TargetId, str]
    load: LoadStats
    attempts: int = 1


def run_unit(
    task: UnitTask,
    on_bytes: Callable[[int], None],
    stop: threading.Event,
) -> UnitReport:
    """Run a unit for all targets of the task.

    Raises:
        TransientIOError: worth another attempt.
        WeightmillError: the source cannot be read, or an output not be written.
    """
    unit, began = task.unit, time.perf_counter()
    warmth = by_warmth(cached_share(task.root, unit.sources), unit.source_bytes)
    attempt, timer = uuid.uuid4().hex[:12], Timer()
    specs = [spec for recipe in unit.recipes for _, spec in recipe.stored]
    with (
        PeakMemory() as memory,
        task.strategy.open(task.root, specs) as reader,
        leased_kernels(task.backend) as kernels,
        ThreadPoolExecutor(task.threads, thread_name_prefix=unit.id) as pool,
    ):
        work = ThreadedWork(kernels, pool, stop)
        runs = {target: TargetRun(task, target, attempt, timer) for target in task.journals}
        try:
            passes = UnitPass(task, reader, work, runs, timer, on_bytes)
            for recipe in (r for r in unit.recipes if r.source_bytes > SMALL):
                passes.tensor(recipe, task.threads)
            work.each([r for r in unit.recipes if r.source_bytes <= SMALL], passes.tensor)
            for run in runs.values():
                work.check()
                run.finish()
        finally:
            for run in runs.values():
                run.abort()
        spent = timer.seconds()
        load = LoadStats(
            files=len(unit.sources), tensors=len(unit.recipes), bytes=unit.source_bytes,
            wall_s=time.perf_counter() - began, peak_anonymous_bytes=memory.peak_bytes, **warmth,
            read_s=spent["read_s"], encode_s=spent["encode_s"], measure_s=spent["measure_s"], write_s=spent["write_s"],
        )  # fmt: skip
    records = {target: run.record(load) for target, run in runs.items() if not run.faults}
    return UnitReport(unit.id, records, {t: run.failure for t, run in runs.items() if run.faults}, load)


class TargetRun:
    """One target's share of a unit: its files, and what was found wrong."""

    def __init__(self, task: UnitTask, target: TargetId, attempt: str, timer: Timer) -> None:
        path, key = task.journals[target]
        self._task = task
        self._journal = Journal(path, key)
        if not self._journal.parts.is_dir():
            raise StorageError(
                f"{self._journal.root}: not found on {socket.gethostname()}; on several machines the output must lie on"
                " a filesystem that all of them share"
            )
        self._target = target
        self._attempt = attempt
        output = task.unit.outputs[target]
        self.placements = {placement.recipe: placement for placement in output.placements}
        self.faults: list[tuple[float, str]] = []
        self._measured: dict[str, Measured] = {}
        self._finished: Finished = ((), ())
        name = f"{task.unit.id}.{attempt}"
        self._files = PartFiles(self._journal, name, output, timer, in_place=task.in_place)

    def begin(self, placement: Placement) -> TensorPart:
        return self._files.tensor(placement)

    def measured(self, recipe: Recipe, placement: Placement, error: ErrorSums) -> None:
        self._measured[recipe.name] = Measured(recipe, placement.action, placement, error)
        fault = self._task.gate.fault(recipe.name, error, placement.scheme)
        if fault:
            self.faults.append((error.relative_error, fault))

    def finish(self) -> None:
        """Make the files whole, unless something is wrong with them."""
        if self.faults:
            return
        try:
            self._finished = self._files.finish([self._measured[name] for name in self.placements])
        except VerifyFailed as error:
            self.faults.append((math.inf, str(error)))

    @property
    def failure(self) -> str:
        """The worst fault, and how many there are."""
        worst = max(self.faults)[1]
        return worst if len(self.faults) == 1 else f"{worst} (the worst of {len(self.faults)} in {self._task.unit.id})"

    def record(self, load: LoadStats) -> Record:
        """Leave the record: the unit is done for this target."""
        written, tensors = self._finished
        key = self._task.unit.key(self._target)
        record = Record(self._task.unit.id, key, written, tensors, load, socket.gethostname(), self._attempt)
        self._journal.add(record)
        return record

    def abort(self) -> None:
        self._files.abort()


class UnitPass:
    """One pass over a unit's tensors, each for all targets while it is hot."""

    def __init__(
        self, task: UnitTask, reader: Reader, work: ThreadedWork, runs: Mapping[TargetId, TargetRun], timer: Timer,
        on_bytes: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._reader = reader
        self._work = work
        self._runs = runs
        self._timer = timer
        self._on_bytes = on_bytes
        self._groups: dict[str, list[Recipe]] = {}
        for recipe in (r for r in task.unit.recipes if r.group is not None):
            self._groups.setdefault(str(recipe.group), []).append(recipe)
        self._shared: dict[tuple[TargetId, str], Scheme] = {}
        self._sharing = threading.Lock()

    def tensor(self, recipe: Recipe, threads: int = 1) -> None:
        """Encode and measure one tensor, with so many threads at work on it."""
        plain = view_of(recipe, self._reader, self._work)
        for target, run in self._runs.items():
            placement = run.placements.get(recipe.name)
            if placement is None:  # dropped
                self._on_bytes(recipe.source_bytes)
                continue
            ordered = numbers_view(ordered_view(plain, placement.order), placement.cast, self._work)
            seen = encoded_view(TimedView(ordered, self._timer, "read"), placement.cast)
            part = run.begin(placement)
            try:
                with self._timer.phase("encode", threads):
                    self._knowing(target, recipe, placement.scheme).encode(seen, part, self._work)
            except VerifyFailed as error:
                run.faults.append((math.inf, str(error)))
                continue
            with self._timer.phase("measure", threads):
                again = TimedView(ordered, self._timer, "reread")
                error_sums = measure(again, placement.scheme, seen.spec, part, self._work, self._on_bytes)
            run.measured(recipe, placement, error_sums)
            part.done()

    def _knowing(self, target: TargetId, recipe: Recipe, scheme: Scheme) -> Scheme:
        """The scheme with what it shares over the tensor's fused group, found once a group."""
        if not isinstance(scheme, Sharing):
            return scheme
        partners = self._groups[recipe.group] if recipe.group is not None else [recipe]
        with self._sharing:
            key = (target, recipe.group or recipe.name)
            if key not in self._shared:
                placements = self._runs[target].placements
                mine = [(r, placements[r.name]) for r in partners if r.name in placements]
                plain = ((ordered_view(view_of(r, self._reader, self._work), p.order), p) for r, p in mine)
                views = [
                    encoded_view(TimedView(v, self._timer, "read"), p.cast) for v, p in plain if p.scheme == scheme
                ]
                self._shared[key] = scheme.share(views, self._work)
            return self._shared[key]


class TimedView:
    """A view whose reading is timed."""

    def __init__(self, view: View, timer: Timer, phase: str) -> None:
        self.spec = view.spec
        self._view = view
        self._timer = timer
        self._phase = phase

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        with self._timer.phase(self._phase):
            return self._view.read(start, stop, slot)
