"""Running a unit: its tensors are read once, and for each target encoded, measured, written and recorded.

Jobs of a sweep that read the same tensors share a task, and each tensor is encoded for all of them while it is in the
CPU's cache. An error of one job ends only that job's share; an error of all of them, such as a damaged source, ends
the unit.

The same code runs on a thread of this process and in a Ray task. Units of one process share its crew of threads: while
one is finished, which mostly waits for the disk, the threads work on the next.
"""

from __future__ import annotations

import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from jobs.cli.early import is_program
from jobs.execution.cluster import reach_source
from jobs.execution.part_files import PartFiles
from jobs.output.journal import Done, Journal, Record, TensorRecord, Written, WrittenTensor
from jobs.planning.plan import Placement, Unit
from jobs.planning.targets import TargetId
from loaders.backends import encoded_on, leased_kernels
from loaders.backends.memory import PeakMemory
from loaders.backends.scratch import Scratch
from loaders.backends.threads import STAGING_BYTES, Stopped, ThreadedWork, shared_crew
from loaders.clock import Clock
from loaders.containers.writer import TensorSink
from loaders.errors import TransientIOError, VerifyFailed, WeightmillError
from loaders.quantization.gate import Gate
from loaders.stats import ErrorSums, LoadStats
from loaders.storage import open_source
from loaders.storage.address import Address
from loaders.storage.base import PinnedFiles
from loaders.strategies import Reader, WeightLoader
from loaders.strategies.base import by_warmth, cached_share
from loaders.strategies.reading.cut_maps import end_by_name
from loaders.tensors.encoding import Encoding, TensorEncoder
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.merged import check_adapters
from loaders.tensors.uses import Uses

Finished = tuple[tuple[Written, ...], tuple[TensorRecord, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One job's share of a task: its own unit, where it is encoded, and the output that its file and record go to."""

    unit: Unit
    target: TargetId
    output: Address
    key: str
    gate: Gate
    backend: str
    searches: bool = False  # whether the backend may find other codes than the CPU, as one that was asked for may

    def encoded_on(self, encoding: Encoding) -> str:
        """Return the backend on which a tensor is encoded: the CPU copies, and does what the share's own cannot do."""
        if encoding.action != "quantize":
            return "cpu"
        return encoded_on(encoding.scheme, self.backend, searches=self.searches)

    @property
    def journal(self) -> Journal:
        return Journal(self.output, self.key)

    @property
    def work_bytes(self) -> int:
        """The bytes that progress counts: of the weights of all that is encoded, and of what is dropped."""
        placed = [placement.encoding for placement in self.unit.outputs[self.target].placements]
        names = {encoding.tensor.source_name for encoding in placed}
        dropped = (tensor.spec.size for tensor in self.unit.tensors if tensor.name not in names)
        return sum(encoding.numbers_bytes for encoding in placed) + sum(dropped)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTask:
    """Everything that a worker needs to run a unit. It is small: paths and specs, no weights."""

    unit: Unit
    source: Address
    shares: Mapping[str, Share]
    strategy: WeightLoader
    threads: int
    in_place: bool = False  # whether pieces are written into the shared file; only if all units run in one process

    @property
    def memory_bytes(self) -> int:
        """The most bytes that running the task holds, besides the libraries."""
        most = max(share.unit.memory_bytes(self.threads) for share in self.shares.values())
        return most + self.strategy.held_bytes + staging_bytes(self.backends, self.threads)

    @property
    def backends(self) -> frozenset[str]:
        """The backends on which its tensors are encoded, and the CPU, which copies and encodes what others cannot."""
        return frozenset({"cpu", *(share.encoded_on(each) for share, each in self._encodings)})

    @property
    def _encodings(self) -> Iterator[tuple[Share, Encoding]]:
        for share in self.shares.values():
            for placement in share.unit.outputs[share.target].placements:
                yield share, placement.encoding

    @property
    def gpus(self) -> int:
        """The GPUs that a cluster must reserve for the task."""
        return int("cuda" in self.backends)

    @property
    def work_bytes(self) -> int:
        """The bytes of the weights to encode, as they are when decoded, counted once for each share."""
        return sum(share.work_bytes for share in self.shares.values())

    @property
    def journals(self) -> tuple[Journal, ...]:
        return tuple({str(share.output): share.journal for share in self.shares.values()}.values())

    @property
    def scratch_bytes(self) -> int:
        remote = [share for share in self.shares.values() if not share.journal.destination.is_local]
        return sum(file.size for share in remote for file in share.unit.outputs[share.target].files)

    @property
    def by_architecture(self) -> bool:
        return any(each.action == "quantize" and each.scheme.engine == "hqq" for _, each in self._encodings)

    def reach(self) -> None:
        reach_source(self.source, self.unit)

    def run(self, on_bytes: Callable[[int], None], stop: threading.Event) -> UnitReport:
        return run_unit(self, on_bytes, stop)


def staging_bytes(backends: Collection[str], threads: int) -> int:
    """Return the bytes of a unit's threads for copies to and from devices, beside what `Unit.memory_bytes` counts."""
    return 0 if set(backends) == {"cpu"} else threads * STAGING_BYTES


@dataclass(frozen=True, slots=True)
class UnitReport:
    """The result of an attempt: by share, what is done, and the reason for each that failed."""

    unit: str
    done: Mapping[str, Done]
    failures: Mapping[str, str]
    load: LoadStats
    attempts: int = 1


def run_unit(
    task: UnitTask,
    on_bytes: Callable[[int], None],
    stop: threading.Event,
) -> UnitReport:
    """Run a unit for all shares of the task.

    Raises:
        TransientIOError: reading or writing failed in a way that is worth a retry.
        WeightmillError: the source cannot be read, or no share's output can be written.
    """
    unit, began = task.unit, time.perf_counter()
    files = PinnedFiles(open_source(task.source), unit.sources)
    files.check_unchanged()
    warmth = by_warmth(cached_share(files, unit.sources), unit.source_bytes)
    attempt = uuid.uuid4().hex[:12]
    specs = [spec for tensor in unit.tensors for _, spec in tensor.stored]
    runs: dict[str, TargetRun] = {}
    if is_program():
        end_by_name()
    with (
        PeakMemory() as memory,
        task.strategy.open(files, specs) as reader,
        ExitStack() as leases,
        shared_crew(task.threads) as crew,
    ):
        kernels = {name: leases.enter_context(leased_kernels(name)) for name in sorted(task.backends)}
        work = ThreadedWork(next(iter(kernels.values())), crew, stop, crew.scratch)
        try:
            for name, share in task.shares.items():
                if not share.journal.is_left_out:
                    runs[name] = TargetRun(
                        share, attempt, crew.scratch, warmth, is_alone=len(task.shares) == 1, in_place=task.in_place
                    )
            on_backends = {name: work.on(each) for name, each in kernels.items()}
            passes = UnitPass(reader, unit.tensors, on_backends, runs, on_bytes, stop)
            work.each(unit.tensors if runs else (), passes.tensor)
            # A memory map does not notice that its file changed; then what was read may be of two versions.
            files.check_unchanged()
            check_adapters(unit.tensors)
            for run in runs.values():
                work.check()
                run.finish()
            errors = [run.error for run in runs.values() if run.error is not None]
            # An error of every share is most likely the source's or the machine's, so it is the whole unit's.
            if errors and len(errors) == len(runs):
                raise errors[0]
        finally:
            for run in runs.values():
                run.abort()
    load = LoadStats(
        files=len(unit.sources), tensors=len(unit.tensors), bytes=unit.source_bytes if runs else 0,
        wall_s=time.perf_counter() - began, peak_anonymous_bytes=memory.peak_bytes, **(warmth if runs else {}),
    )  # fmt: skip
    done: dict[str, Done] = {}
    for name, run in runs.items():
        if not run.failure:
            with run.guarded():
                done[name] = run.record(load)
    return UnitReport(unit.id, done, {name: run.failure for name, run in runs.items() if run.failure}, load)


class TargetRun:
    """One share while it runs: its files, and the faults found so far."""

    def __init__(
        self, share: Share, attempt: str, scratch: Scratch, warmth: Mapping[str, int], *, is_alone: bool, in_place: bool
    ) -> None:
        self._warmth = warmth
        self._share = share
        self._journal = share.journal
        self._is_alone = is_alone
        self._attempt = attempt
        self._shares_unit = not in_place  # with attempts of other processes
        self._before = ""  # the attempt that has made the unit's record before this one began
        self._first: Record | None = None  # of another attempt, which was faster
        self._began = time.perf_counter()
        self._clock = Clock()
        self.tensors = {tensor.name: tensor for tensor in share.unit.tensors}
        self.error: Exception | None = None
        self.faults: list[tuple[float, str]] = []
        self._errors: dict[str, ErrorSums] = {}
        self._finished: Finished | None = None
        self._files: PartFiles | None = None
        output = share.unit.outputs[share.target]
        self.placements = {placement.name: placement for placement in output.placements}
        self._by_source: dict[str, list[Placement]] = {}
        for placement in output.placements:
            self._by_source.setdefault(placement.encoding.tensor.source_name, []).append(placement)
        with self.guarded():
            self._journal.check_there()
            if (before := self._recorded) is not None:
                self._before = before.attempt
            name = f"{share.unit.id}.{attempt}"
            self._files = PartFiles(self._journal, name, output, self._clock, scratch, in_place=in_place)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep an error inside the block to this share, if others run in the same task.

        Raises:
            Stopped, TransientIOError: these end the attempt for all shares.
            Exception: any error, if this is the task's only share.
        """
        try:
            yield
        except VerifyFailed as error:
            self.faults.append((math.inf, str(error)))
        except (Stopped, TransientIOError):
            raise
        except Exception as error:
            if self._is_alone:
                raise
            self.error = error

    def takes(self, tensor: LogicalTensor) -> bool:
        return self.error is None and self.tensors.get(tensor.name) == tensor

    def placed(self, tensor: LogicalTensor) -> Sequence[Placement]:
        """Return what this share makes of a source's tensor: nothing if it is dropped, several if it is cut."""
        return self._by_source.get(tensor.name, ())

    def encoder(self, reader: Reader, work: ThreadedWork) -> TensorEncoder:
        """Return an encoder for this share's tensors."""
        return TensorEncoder(reader, work, [p.encoding for p in self.placements.values()], self._clock)

    def encoded_on(self, placement: Placement) -> str:
        return self._share.encoded_on(placement.encoding)

    def begin(self, placement: Placement) -> TensorSink:
        assert self._files is not None
        return self._files.tensor(placement)

    def measured(self, placement: Placement, error: ErrorSums) -> None:
        self._errors[placement.name] = error
        fault = self._share.gate.fault(placement.name, error, placement.encoding.scheme)
        if fault:
            self.faults.append((error.relative_error, fault))

    @property
    def _recorded(self) -> Record | None:
        return self._journal.record(self._share.unit) if self._shares_unit else None

    def finish(self) -> None:
        """Complete the files, unless there are faults, or another attempt was first: then its files stay."""
        if self._files is not None and not self.failure:
            with self.guarded():
                self._journal.check_there()
                found = self._recorded
                if found and found.key == self._share.unit.key(self._share.target) and found.attempt != self._before:
                    self._first = found
                    return
                written, stored = self._files.finish()
                records = (
                    _record(p, stored, self._errors[name], self.encoded_on(p)) for name, p in self.placements.items()
                )
                self._finished = written, tuple(records)

    @property
    def failure(self) -> str:
        """The worst fault and their number; empty if there is none."""
        if self.error is not None:
            known = isinstance(self.error, WeightmillError | OSError)
            return str(self.error) if known else f"{type(self.error).__name__}: {self.error} (a fault of weightmill)"
        if not self.faults:
            return ""
        worst = max(self.faults)[1]
        return worst if len(self.faults) == 1 else f"{worst} (the worst of {len(self.faults)} in {self._share.unit.id})"

    def record(self, load: LoadStats) -> Done:
        """Write the record of the finished unit for this target, and return what the job needs of it."""
        if self._first is not None:
            return self._first.done
        unit = self._share.unit
        written, tensors = self._finished or ((), ())
        spent = self._clock.seconds()
        own = LoadStats(
            files=len(unit.sources), tensors=len(unit.tensors), bytes=unit.source_bytes,
            wall_s=time.perf_counter() - self._began, peak_anonymous_bytes=load.peak_anonymous_bytes,
            read_s=spent["read_s"], encode_s=spent["encode_s"], measure_s=spent["measure_s"],
            write_s=spent["write_s"], upload_s=spent["upload_s"], **self._warmth,
        )  # fmt: skip
        key = unit.key(self._share.target)
        record = Record(
            unit=unit.id,
            key=key,
            files=written,
            tensors=tensors,
            load=own,
            node=socket.gethostname(),
            backend=self._share.backend,
            attempt=self._attempt,
        )
        self._journal.add(record)
        return record.done

    def abort(self) -> None:
        if self._files is not None:
            self._files.abort()


def _record(placement: Placement, stored: Mapping[str, WrittenTensor], error: ErrorSums, backend: str) -> TensorRecord:
    encoding, tensor = placement.encoding, placement.encoding.tensor
    mine = {slot.name: stored[slot.name] for slot in placement.slots.values()}
    return TensorRecord(
        name=tensor.name, role=tensor.role, action=encoding.action, dtype=tensor.dtype.name, shape=tensor.shape,
        source_bytes=tensor.source_bytes, stored=mine, error=error, backend=backend,
    )  # fmt: skip


class UnitPass:
    """One pass over a unit's tensors, each encoded for all targets while it is in the CPU's cache."""

    def __init__(
        self,
        reader: Reader,
        tensors: Sequence[LogicalTensor],
        work: Mapping[str, ThreadedWork],
        runs: Mapping[str, TargetRun],
        on_bytes: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        """`work` holds the tools of each backend."""
        self._runs = [(run, {name: run.encoder(reader, each) for name, each in work.items()}) for run in runs.values()]
        self._on_bytes = on_bytes
        placed = {
            tensor.name: [p.encoding for run in runs.values() if run.takes(tensor) for p in run.placed(tensor)]
            for tensor in tensors
        }
        # What is dropped is not read.
        self._uses = Uses(reader, [tensor for tensor in tensors if placed[tensor.name]], placed, stop)

    def tensor(self, tensor: LogicalTensor) -> None:
        """Encode and measure one tensor for all shares that take it."""
        with self._uses.of(tensor.name):
            for run, encoders in self._runs:
                if run.takes(tensor):
                    with run.guarded():
                        self._encode(run, encoders, tensor)

    def _encode(self, run: TargetRun, encoders: Mapping[str, TensorEncoder], tensor: LogicalTensor) -> None:
        placements = run.placed(tensor)
        if not placements:  # dropped
            self._on_bytes(tensor.spec.size)
        for placement in placements:
            sink = run.begin(placement)
            encoder = encoders[run.encoded_on(placement)]
            run.measured(placement, encoder.encode(placement.encoding, sink, self._on_bytes))
            sink.done()
