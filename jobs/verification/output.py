"""Verifying a published output again, with the units of its job but without encoding.

Every file must have the hash in the report. Every tensor is decoded and compared with the source, must pass the gate,
and must give exactly the error sums that were recorded when it was written. With verify=logits or verify=embeddings,
the output then runs in its engine.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import xxhash
from pydantic import ValidationError
from rich.console import Group

from jobs.cli.early import is_program
from jobs.cli.verb import FAILED, Said, note
from jobs.execution.choose import choose, is_local
from jobs.execution.cluster import reach_source
from jobs.execution.run_tasks import run_all
from jobs.output.card_block import CARD, LIMIT
from jobs.output.journal import Journal
from jobs.output.publish import with_page
from jobs.output.report import (
    FileRange,
    Report,
    ReportedTensor,
    read_report,
)  # fmt: skip
from jobs.planning.build import make_plan
from jobs.planning.plan import Placement, Plan, Unit
from jobs.planning.targets import TARGET, target_of
from jobs.report.card import updated
from jobs.report.loading import loading_of
from jobs.report.metrics import damage_of
from jobs.report.page import make_page
from jobs.report.result import quality_text
from jobs.spec.cluster import ClusterSpec
from jobs.spec.job import JobSpec
from jobs.spec.strategy import StrategySpec, reading
from jobs.spec.verify import JudgedSpec, VerifySpec
from jobs.verification.judging_task import check_can_judge, cluster_to_judge
from jobs.verification.logits import Judging, asked, faults_of, judged, judging_of
from jobs.verification.without_weights import list_faults, page_faults, range_digest, report_faults
from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec, VerifyFailed
from loaders.faults import sentences
from loaders.quantization.gate import Gate
from loaders.specs import Slot, WeightSpec
from loaders.storage import open_source, open_store
from loaders.storage.address import Address
from loaders.storage.atomic import write_file
from loaders.storage.base import OUR_PAGE, OUR_REPORT, PinnedFiles
from loaders.storage.hashes import BLOCK
from loaders.strategies import WeightLoader
from loaders.strategies.base import Expecting, TensorBytes, Use
from loaders.strategies.reading.cut_maps import end_by_name
from loaders.tensors.encoding import TensorEncoder
from loaders.tensors.uses import Uses
from loaders.tensors.views import StoredRoles
from loaders.words import counted, in_a_line

SHOWN = 10  # faults that the text lists before it counts the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyTask:
    """A `Task` that verifies a unit: its source, its output, and what was recorded about it."""

    unit: Unit
    source: Address
    output: Address
    weights: Mapping[str, WeightSpec]  # the output's tensors by name
    files: tuple[tuple[str, FileRange], ...]  # files' names, and the range of each that the unit wrote
    recorded: Mapping[str, ReportedTensor]
    strategy: WeightLoader  # reads the source
    output_strategy: WeightLoader
    threads: int
    gate: Gate
    gpus: int = 0
    journals: tuple[Journal, ...] = ()  # what is verified is published
    scratch_bytes: int = 0
    by_architecture: bool = False

    @property
    def memory_bytes(self) -> int:
        return self.unit.memory_bytes(self.threads) + self.strategy.held_bytes + self.output_strategy.held_bytes

    @property
    def work_bytes(self) -> int:
        return self.unit.source_bytes

    def reach(self) -> None:
        reach_source(self.source, self.unit)
        PinnedFiles(open_store(self.output)).entry(OUR_REPORT)

    def run(self, on_bytes: Callable[[int], None], stop: threading.Event) -> VerifyReport:
        faults = [fault for name, written in self.files for fault in _file_faults(self, name, written)]
        is_as_written = not faults
        sources = [spec for tensor in self.unit.tensors for _, spec in tensor.stored]
        if is_program():
            end_by_name()
        with (
            self.strategy.open(PinnedFiles(open_source(self.source), self.unit.sources), sources) as source,
            self.output_strategy.open(PinnedFiles(open_store(self.output)), list(self.weights.values())) as written,
            Crew(self.threads) as crew,
        ):
            work = ThreadedWork(kernels_of("cpu"), crew, stop)

            encoder = TensorEncoder(source, work)
            placements = self.unit.outputs[TARGET].placements
            by_name = {p.encoding.tensor.name: [p.encoding] for p in placements}
            uses = Uses(source, [p.encoding.tensor for p in placements], by_name, stop, in_one_trip=True)
            parts = {p.name: Use(tuple(map(TensorBytes.whole, self._stored(p).values()))) for p in placements}
            if isinstance(written, Expecting):
                written.expect(list(parts.values()), stop)

            def look(placement: Placement) -> list[str]:
                name, encoding = placement.name, placement.encoding
                stored = StoredRoles(written, self._stored(placement))
                with ExitStack() as stack:
                    stack.enter_context(uses.of(encoding.tensor.name))
                    if isinstance(written, Expecting):
                        stack.enter_context(written.using(parts[name]))
                    error = encoder.measure(encoding, stored, on_bytes)
                fault = self.gate.fault(name, error, encoding.scheme)
                found = [fault] if fault else []
                # Sums are compared exactly: they add up the same ranges in the same order as when they were recorded.
                if error != self.recorded[name].sums:
                    found.append(
                        f"{name}: its error is {error.relative_error:.6g}, not what was recorded"
                        + (f"; the output is as it was written: {self.source} has changed" if is_as_written else "")
                    )
                return found

            faults += [fault for found in work.each(placements, look) for fault in found]
        return VerifyReport(self.unit.id, tuple(faults), len(placements))

    def _stored(self, placement: Placement) -> dict[str, WeightSpec]:
        return {role: self.weights[slot.name] for role, slot in placement.slots.items()}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of verifying a unit: the faults found, and the number of tensors checked."""

    unit: str
    faults: tuple[str, ...]
    tensors: int
    attempts: int = 1


def _file_faults(task: VerifyTask, name: str, written: FileRange) -> list[str]:
    """Check a file's hash; if it is wrong, name the tensors whose bytes changed, or else the file."""
    files = PinnedFiles(open_store(task.output))
    if range_digest(files, name, written) == written.xxh3:
        return []
    digests = {part: each.xxh3 for row in task.recorded.values() for part, each in row.stored.items()}
    faults = []
    for spec in (spec for spec in task.weights.values() if spec.file == name):
        hasher = xxhash.xxh3_64()
        for at in range(0, spec.size, BLOCK):
            hasher.update(files.read(name, spec.offset + at, spec.offset + min(at + BLOCK, spec.size)))
        if hasher.hexdigest() != digests[spec.name]:
            faults.append(f"{name}: {spec.name}: its bytes are not those that were written")
    return faults or [f"{name}: what stands around its tensors is not as it was written"]


def verify_output(
    output: Address,
    source: str | None,
    cluster_spec: ClusterSpec,
    strategy_spec: StrategySpec,
    verify: VerifySpec | None = None,
) -> Said:
    """Verify an output against its source, which may have moved. The limits of `verify` apply besides the job's own.

    Raises:
        BadSpec: it is not an output of weightmill, or of another version, or the source is not the one it was made
            from.
        BadCheckpoint: a file of the output or the source is so damaged that it cannot be opened.
    """
    pinned = open_store(output).address  # of the Hub: the commit that the branch is now
    report = read_report(pinned)
    spec = _recorded_spec(report, source, verify)
    plan = _plan_again(spec, report)
    judging = None
    if isinstance(verify, JudgedSpec):
        judging = judging_of(verify, plan, plan.targets[TARGET], output, here=is_local(cluster_spec))
        note(judging.note)
    written = open_checkpoint(pinned)
    faults = report_faults(plan, written, report) or list_faults(plan, written, report)
    checked = 0
    if not faults:
        cluster, _ = choose(cluster_spec)
        if judging is not None and not cluster.is_local:
            check_can_judge(cluster, [judging.task(open_store(output), output.name)])
        strategies = [reading(strategy_spec, side)[0] for side in (plan.checkpoint, written)]
        tasks = _tasks(plan, written, report, spec, strategies, cluster.threads)
        with closing(run_all(cluster, tasks, "verifying", plan.source_bytes)) as reports:
            for report_of_unit in reports:
                faults += report_of_unit.faults
                checked += report_of_unit.tensors
    damaged = page_faults(written, report)
    quality = None if judging is None or faults else _judge(judging, output, report, plan, faults, cluster_spec)
    # Judging writes the page anew.
    faults += damaged if quality is None else []
    return _said(output, plan, checked, faults, quality)


def _judge(
    judging: Judging, output: Address, report: Report, plan: Plan, faults: list[str], cluster_spec: ClusterSpec
) -> dict[str, Any] | None:
    """Evaluate an output as `judge_published`; returns its quality, and adds faults to `faults`."""
    try:
        quality = judge_published(judging, output, report, plan, cluster_spec).quality
    except (BadCheckpoint, VerifyFailed) as error:
        faults.append(str(error))
        return None
    assert quality is not None
    faults += faults_of(judging.spec, quality)
    return quality


def judge_published(judging: Judging, output: Address, report: Report, plan: Plan, cluster_spec: ClusterSpec) -> Report:
    """Evaluate a published output in its engine, on the settings' cluster.

    Returns its report with the numbers, which it and its card have then.

    Raises:
        BadCheckpoint: its engine cannot load it, or its original.
        VerifyFailed: it computes NaN or infinities.
    """
    with cluster_to_judge(cluster_spec) as cluster:
        found = judged(judging, open_store(output), output.name, cluster=cluster)
    quality = {**found.to_json(), "asked": asked(judging.spec.model_dump())}
    target = plan.targets[TARGET]
    damage = damage_of(report.tensors, report.totals, loading_of(plan, target).engine, quality)
    report = report.model_copy(update={"quality": quality, "damage": damage})
    files = PinnedFiles(open_store(output))
    if report.run.request["output"].get("card", False):
        write_file(output.path / CARD, updated(files.read_all(CARD, LIMIT), report, plan, target, output))
    page = make_page(report, plan, target, output)
    report = with_page(report, page)
    write_file(output.path / OUR_PAGE, page)
    write_file(output.path / OUR_REPORT, report.to_bytes())
    return report


def _recorded_spec(report: Report, source: str | None, verify: VerifySpec | None) -> JobSpec:
    try:
        job = {**report.run.request, **report.job}
        job["verify"] = _both({"kind": "strict", **job["verify"]}, verify)
        spec = JobSpec.model_validate(job, strict=False)
    except ValidationError as error:
        said = "; ".join(sentences(JobSpec, error.errors())[:3])
        raise BadCheckpoint(f"{OUR_REPORT}: not a report of this version ({said})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{OUR_REPORT}: not a report of this version ({type(error).__name__}: {error})") from None
    if source is None:
        # Where it was read, which of the Hub is the commit.
        source = report.source.path
        _check_not_chosen(source)
        if open_source(source).absence() is not None:
            raise BadSpec(f"model.path: the source is no longer at {source}; give model.path=DIR where it is now")
    # Some outputs name files after the model, whose default name is that of the source's former folder.
    named = {"path": source, "name": spec.model_name}
    return spec.model_copy(update={"model": spec.model.model_copy(update=named)})


def _check_not_chosen(source: str) -> None:
    """Refuse to ask a server because a file says so: who made it may be a stranger, and the server an inner one."""
    if Address.of(source).scheme in ("http", "https"):
        raise BadSpec(
            f"model.path: {OUR_REPORT} names the source {Address.of(source)}, and no server is asked because a file"
            " says so; give the address as model.path=URL"
        )


def _both(recorded: dict[str, Any], asked: VerifySpec | None) -> dict[str, Any]:
    """Combine the recorded gate with the requested one: the lower error limit, and NaN allowed if either allows it."""
    if asked is None:
        return recorded
    limits = [each for each in (recorded["max_relative_error"], asked.max_relative_error) if each is not None]
    lets_pass = recorded["allow_nonfinite"] or asked.allow_nonfinite
    return {**recorded, "allow_nonfinite": lets_pass, "max_relative_error": min(limits, default=None)}


def _plan_again(spec: JobSpec, report: Report) -> Plan:
    checkpoint = open_checkpoint(spec.source_address, spec.source.container)
    if checkpoint.fingerprint != report.source.fingerprint:
        raise BadSpec(
            f"model.path: {checkpoint.address} is not the checkpoint that the output was made from: expected"
            f" fingerprint {report.source.fingerprint}, found {checkpoint.fingerprint}"
        )
    plan = make_plan(checkpoint, [target_of(spec)], spec.unit_mb)
    merged, recorded = plan.sources.adapter, report.adapter
    if merged is not None and recorded is not None and merged.digest != recorded.xxh3:
        raise BadSpec(
            f"transform.path: {merged.address / merged.entry.name} is not the file that was merged into the output:"
            f" expected xxh3-128 {recorded.xxh3}, found {merged.digest}"
        )
    matrix, measured = plan.targets[TARGET].imatrix, report.imatrix
    if matrix is not None and measured is not None and matrix.file.digest != measured.xxh3:
        raise BadSpec(
            f"quant.imatrix: {matrix.file.address / matrix.file.entry.name} is not the one by which the output was"
            f" quantized: expected xxh3-128 {measured.xxh3}, found {matrix.file.digest}"
        )
    return plan


def _tasks(
    plan: Plan,
    written: Checkpoint,
    report: Report,
    spec: JobSpec,
    strategies: Sequence[WeightLoader],
    threads: int,
) -> list[VerifyTask]:
    reads_source, reads_output = strategies
    weights = {spec.name: spec for spec in written.weights}
    files = {written.name: (file.name, written) for file in report.files for written in file.ranges}
    recorded = {row.name: row for row in report.tensors}
    gate = Gate(spec.verify.allow_nonfinite, spec.verify.max_relative_error)
    tasks = []
    for unit in plan.units:
        share = unit.outputs[TARGET]
        slots = [slot for p in share.placements for slot in p.slots.values()]
        tasks.append(
            VerifyTask(
                unit=unit,
                source=plan.checkpoint.address,
                output=written.address,
                weights={slot.name: _written(slot, weights) for slot in slots},
                files=tuple(files[file.name] for file in share.files),
                recorded={p.name: recorded[p.name] for p in share.placements},
                strategy=reads_source,
                output_strategy=reads_output,
                threads=threads,
                gate=gate,
            )
        )
    return tasks


def _written(slot: Slot, weights: Mapping[str, WeightSpec]) -> WeightSpec:
    """Return the stored tensor, or the part of a stack, that holds a slot's bytes in the output."""
    if slot.within is None:
        return weights[slot.name]
    name, offset = slot.within
    whole = weights[name]
    return WeightSpec(
        name=slot.name,
        dtype=slot.dtype,
        shape=slot.shape,
        file=whole.file,
        offset=whole.offset + offset,
        size=slot.size,
    )


def _said(output: Address, plan: Plan, checked: int, faults: list[str], quality: Mapping[str, Any] | None) -> Said:
    document = {
        "status": "failed" if faults else "verified",
        "output": str(output),
        "source": str(plan.checkpoint.address),
        "tensors": checked,
        "faults": faults,
        **({} if quality is None else {"quality": quality}),
    }
    shown = [] if quality is None else [quality_text(quality)]
    if not faults:
        text = f"verified: {output}: {checked} tensors, every byte and every error as recorded"
        return Said(document, Group(text, *shown))
    causes = by_cause(faults)
    lines = [
        f"NOT right: {output}: {counted(len(faults), 'fault')}",
        *(f"  {in_a_line(cause)}" for cause in causes[:SHOWN]),
    ]
    lines += [f"  ... and {len(causes) - SHOWN} more"] if len(causes) > SHOWN else []
    lines += ["  format=json lists all"] if len(lines) <= len(faults) else []
    return Said(document, Group(*lines, *shown), FAILED)


def by_cause(faults: Sequence[str]) -> list[str]:
    """Return a line for each cause of faults: what is wrong with several tensors is said of the first, and counted."""
    found: dict[str, list[str]] = {}
    for fault in faults:
        _, its, what = fault.rpartition(": its ")
        found.setdefault(re.sub(r"\d[\d.e+-]*", "", what) if its else fault, []).append(fault)
    return [same[0] if len(same) == 1 else f"{same[0]} (and {len(same) - 1} more alike)" for same in found.values()]
