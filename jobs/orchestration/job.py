"""A running job: from its plan over its units to the gate, publishing, tracking and the report.

source_pass.py runs the units of one job, or of several jobs over the same source.
"""

from __future__ import annotations

import platform
import shlex
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Group
from rich.text import Text

from jobs.cli.program import program
from jobs.cli.verb import FAILED, Said, note
from jobs.execution.cluster import Cluster
from jobs.execution.joining import join_on
from jobs.execution.unit import Share
from jobs.orchestration.needs import notes_of
from jobs.orchestration.preflight import Planned
from jobs.output.card_block import CARD
from jobs.output.journal import Done, TensorRecord
from jobs.output.life import Told
from jobs.output.publish import complete, is_published, publish, put_card, put_page, written_headers
from jobs.output.report import Report, ReportedTensor, read_report
from jobs.planning.targets import TARGET
from jobs.report import result
from jobs.report.card import make_card
from jobs.report.document import make_report
from jobs.report.loading import loading_lines, loading_of, place_of
from jobs.report.metrics import quality_metrics
from jobs.report.page import make_page
from jobs.report.plan import plan_document
from jobs.report.source_card import source_card
from jobs.report.tables import whole
from jobs.tracking.job_run import facts, open_job_run, track_job
from jobs.tracking.pages import registered_lines, run_lines
from jobs.tracking.recorder import Recorder
from jobs.tracking.run import NoRun, Run
from jobs.verification.judging_task import JudgeTask
from jobs.verification.logits import asked, judged, pass_gate
from jobs.verification.without_weights import check_finished
from loaders.errors import BadCheckpoint, BadSpec, StorageError, VerifyFailed, WeightmillError
from loaders.lint import Finding, lint_at
from loaders.quantization.gate import Gate
from loaders.stats import LoadStats
from loaders.storage import open_store
from loaders.tensors.merged import check_adapters


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The time and memory of a pass as a whole, which all its jobs share."""

    started: float
    wall_s: float
    peak_bytes: int
    peak_working_set_bytes: int | None
    cluster: str
    strategy: str
    jobs: int
    threads: int  # that work on tensors in one process
    lanes: int  # units of one process at once, each of which uploads by itself


class Job:
    """One job of a pass. `settle` or `fail` sets its `outcome`: the result to show, or the error."""

    def __init__(self, number: int, planned: Planned, sweep: str | None = None, name: str = "") -> None:
        self.number = number
        self.name = name  # by what varies in the sweep
        self.planned = planned
        self.sweep = sweep
        self.run: Run = NoRun()
        self.done: dict[str, Done] = {}
        self.resumed: frozenset[str] = frozenset()
        self.retries = 0
        self._is_held = False
        self.outcome: Said | WeightmillError | None = None
        self.report: Report | None = planned.done

    @property
    def is_whole(self) -> bool:
        """Whether the output was published before the job was interrupted, so that only later steps are left."""
        return is_published(self.planned.journal)

    def begin(self, stack: ExitStack, recorder: Recorder | None) -> None:
        """Take the journal's lock until the stack is closed, open the MLflow run, and find finished units.

        Raises:
            WeightmillError: another process runs this job, or its output or its run cannot be created.
        """
        journal, spec = self.planned.journal, self.planned.spec
        units = len(self.planned.plan.units)
        request = {"key": journal.key, "output": str(journal.output), "units": units, "request": spec.resolved()}
        stack.enter_context(journal.hold(request, overwrite=spec.output.overwrite))
        self._is_held = True
        if open_store(journal.output).absence() is None and not spec.output.overwrite and not self.is_whole:
            raise BadSpec(f"output.path: {journal.output} exists; output.overwrite=true replaces it")
        # The run is opened before any work, so that MLflow shows a job that fails early, or is killed.
        self.run = open_job_run(
            spec, self.planned.plan, self.planned.target, journal, recorder, sweep=self.sweep, number=self.number,
            is_published=self.is_whole,
        )  # fmt: skip
        if self.is_whole:
            note(f"{journal.output} was published before the job was interrupted; finishing what is left")
            return
        self.done = resume(self.planned)
        self.resumed = frozenset(self.done)
        if self.done:
            note(f"{len(self.done)} of {units} units were done before; going on with the rest")

    @property
    def told(self) -> Told | None:
        """What signs of life tell of the job; None if it is not this process's to do."""
        if not self._is_held or self.outcome is not None:
            return None
        return Told(
            journal=self.planned.journal,
            units=len(self.planned.plan.units),
            resumed=len(self.resumed),
            done=lambda: len(self.done),
            failure=lambda: str(self.outcome) if isinstance(self.outcome, WeightmillError) else "",
        )

    def shares(self) -> list[tuple[int, Share]]:
        """Return the units that are left to do, each with the job's number."""
        if self.is_whole or self.outcome is not None:
            return []
        journal, backend = self.planned.journal, self.planned.backend[0]
        return [
            (
                self.number,
                Share(
                    unit=unit,
                    target=TARGET,
                    output=journal.output,
                    key=journal.key,
                    gate=self._gate,
                    backend=backend,
                    searches=self.planned.spec.backend.kind != "auto",
                ),
            )
            for unit in self.planned.plan.units
            if unit.id not in self.done
        ]

    @property
    def judge_task(self) -> JudgeTask:
        """The evaluation of the output as a task for a cluster."""
        judging, journal = self.planned.judging, self.planned.journal
        assert judging is not None
        return judging.task(journal.destination.files, journal.output.name)

    @property
    def _gate(self) -> Gate:
        verify = self.planned.spec.verify
        return Gate(verify.allow_nonfinite, verify.max_relative_error)

    def finish(self, done: Pass, cluster: Cluster) -> None:
        """Check the gate, judge the output on the cluster, publish it, and log the report to MLflow.

        Raises:
            WeightmillError: the output fails verification, or cannot be written.
        """
        if self.is_whole:
            self.report = read_report(self.planned.journal.output)
        else:
            self.report = self._publish(done, cluster)
        planned = self.planned
        if self.run.is_tracked:
            output = planned.journal.output
            track_job(
                self.run,
                planned.spec,
                planned.target,
                output,
                self.report,
                plan_document(planned.spec, planned.plan, planned.target, notes_of(planned)),
                facts(planned.spec, planned.plan, planned.target),
                make_page(self.report, planned.plan, planned.target, output),
            )
        self.run.end("FINISHED")

    def _publish(self, whole: Pass, cluster: Cluster) -> Report:
        planned = self.planned
        units, journal = planned.plan.units, planned.journal
        if self.resumed:
            _pass_gate(planned, journal.tensors(unit for unit in units if unit.id in self.resumed))
        done = [self.done[unit.id] for unit in units]
        has_card = planned.spec.output.card
        join_by = None if cluster.is_local else partial(join_on, cluster, planned.plan.checkpoint.address)
        completed = complete(planned.plan, planned.target, journal, done, card=has_card, join_by=join_by)
        quality = self._judge([file.xxh3 for file in completed.weights], cluster)
        report = make_report(
            planned.spec,
            planned.plan,
            planned.target,
            journal.tensors(units),
            completed,
            self._linted,
            self._about(whole, done),
            quality,
        )
        if has_card:
            report = self._put_card(report)
        report = put_page(journal, report, make_page(report, planned.plan, planned.target, journal.output))
        headers = written_headers(planned.target.finals, report.tensors)
        check_finished(planned.plan, report, journal.destination.files, headers)
        # A unit looks at its own files; those of units that were done before may have changed since.
        planned.plan.checkpoint.check_unchanged()
        check_adapters(planned.plan.sources.tensors)
        publish(planned.journal, report, overwrite=planned.spec.output.overwrite)
        return report

    def _linted(self, tensors: Sequence[ReportedTensor]) -> list[Finding]:
        """Lint the finished files, whose headers are known from their tensors.

        Raises:
            VerifyFailed: the engine will not load the output, and lint=warn was not asked for.
        """
        planned = self.planned
        found = lint_at(planned.journal.destination.files, written_headers(planned.target.finals, tensors))
        _pass_lint(planned, found)
        return [*planned.findings, *found]

    def _put_card(self, report: Report) -> Report:
        planned = self.planned
        theirs = source_card(planned.plan.checkpoint)
        if theirs.note is not None:
            note(f"{CARD} of {planned.plan.checkpoint.address}: {theirs.note}")
        card = make_card(report, planned.plan, planned.target, theirs, planned.journal.output)
        return put_card(planned.journal, report, card)

    def _judge(self, digests: Sequence[str], cluster: Cluster) -> dict[str, Any] | None:
        """Evaluate the finished files if that is asked for. If they fail, the numbers are still tracked.

        Raises:
            VerifyFailed: the quality exceeds a limit, or the engine cannot load the output or computes NaN.
        """
        judging, journal = self.planned.judging, self.planned.journal
        if judging is None:
            return None
        try:
            files, name = journal.destination.files, journal.output.name
            found = judged(judging, files, name, journal.destination, digests, cluster)
        except BadCheckpoint as error:
            raise VerifyFailed(f"not published: {error}") from error
        quality = {**found.to_json(), "asked": asked(judging.spec.model_dump())}
        try:
            pass_gate(judging.spec, quality, journal.output)
        except VerifyFailed:
            self.run.metrics(quality_metrics(quality))
            raise
        return quality

    def _about(self, whole: Pass, done: Sequence[Done]) -> dict[str, Any]:
        """Return the fields of the report's `run`."""
        load = sum((unit.load for unit in done), LoadStats())
        nodes = tuple(sorted({unit.node for unit in done}))
        new = [unit for unit in done if unit.unit not in self.resumed]
        fresh = sum(unit.load.bytes for unit in new)
        price = self.planned.spec.tracking.price_per_hour
        machines = len({unit.node for unit in new})
        return {
            "key": self.planned.journal.key,
            "sweep": self.sweep,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(whole.started)),
            "wall_s": whole.wall_s,
            "throughput_gbps": fresh / whole.wall_s / 1e9,
            "read_s": load.read_s,
            "encode_s": load.encode_s,
            "measure_s": load.measure_s,
            "write_s": load.write_s,
            "upload_s": load.upload_s,
            "bound_by": self._bound_by(whole, load),
            "bytes": load.bytes,
            "files": len(self.planned.plan.checkpoint.files),
            "tensors": load.tensors,
            "peak_anonymous_bytes": max(whole.peak_bytes, load.peak_anonymous_bytes),
            "peak_working_set_bytes": whole.peak_working_set_bytes,
            "units": len(self.planned.plan.units),
            "units_resumed": len(self.resumed),
            "retries": self.retries,
            "jobs_in_pass": whole.jobs,
            "cost": None if price is None else price * machines * whole.wall_s / 3600 / whole.jobs,
            "strategy": whole.strategy,
            "backend": ", ".join(sorted({unit.backend for unit in done})) or self.planned.backend[0],
            "cluster": whole.cluster,
            "nodes": nodes,
            "python": platform.python_version(),
        }

    def _bound_by(self, whole: Pass, load: LoadStats) -> str | None:
        """Return what took longest, by the time that threads spent on it; None where both ends are local."""
        is_local = self.planned.plan.checkpoint.source.store.is_local
        if is_local and self.planned.journal.destination.is_local:
            return None
        spent = {
            "fetch": 0.0 if is_local else load.read_s / whole.threads,
            "encode": (load.encode_s + load.measure_s) / whole.threads,
            "upload": load.upload_s / whole.lanes,
        }
        return max(spent, key=spent.__getitem__)

    def fail(self, error: WeightmillError) -> None:
        """End the job with an error; later units leave it out. Its finished units stay for the next attempt."""
        self.outcome = error
        self.run.end("FAILED")
        if self._is_held:
            with suppress(StorageError):  # such as the one that is the reason
                self.planned.journal.leave_out()

    def stop(self, *, killed: bool) -> None:
        """End the job's run because the whole pass ends, by an interrupt (`killed`) or an error."""
        self.run.end("KILLED" if killed else "FAILED")
        self._tidy()

    def _tidy(self) -> None:
        """Wait until everything is tracked, and remove the journal of a job that finished no unit."""
        _wait(self.run)
        if self._is_held and not self.planned.journal.count:
            self.planned.journal.remove()

    def settle(self) -> None:
        """Wait until everything is tracked, and set the outcome."""
        if self.outcome is None and self.report is not None:
            untracked = _wait(self.run)
            self.outcome = _said(self.planned, self.report, self.run, untracked)
        elif self.outcome is not None:
            self._tidy()

    @property
    def kept(self) -> tuple[int, int]:
        """The units with a record, and all units."""
        return self.planned.journal.count, len(self.planned.plan.units)

    @property
    def how_to_go_on(self) -> str:
        done, units = len(resume(self.planned)), len(self.planned.plan.units)
        return (
            f"interrupted; {done} of {units} units are done and kept: the same command goes on from there,"
            f" {program()} clean {shlex.quote(str(self.planned.journal.output))} delete=true forgets them"
        )


def resume(planned: Planned) -> dict[str, Done]:
    """Return what earlier attempts have done, by unit."""
    found = {unit.id: planned.journal.done(unit, TARGET) for unit in planned.plan.units}
    return {unit: done for unit, done in found.items() if done is not None}


def _pass_gate(planned: Planned, tensors: Iterable[TensorRecord]) -> None:
    """Check the gate over tensors of earlier attempts, which may have passed a wider one.

    Raises:
        VerifyFailed: a tensor fails; the message names the worst.
    """
    gate = Gate(planned.spec.verify.allow_nonfinite, planned.spec.verify.max_relative_error)
    schemes = {d.tensor.name: d.scheme for d in planned.target.decisions if d.scheme is not None}
    faults = [(t.error.relative_error, gate.fault(t.name, t.error, schemes[t.name])) for t in tensors]
    found = [(error, fault) for error, fault in faults if fault]
    if found:
        raise VerifyFailed(f"not published: {max(found)[1]} (the worst of {len(found)})")


def _pass_lint(planned: Planned, found: Sequence[Finding]) -> None:
    """Check that the engine will load the output, and compute what it should.

    Raises:
        VerifyFailed: it will not, and lint=warn was not asked for.
    """
    faults = [finding for finding in found if finding.is_fatal]
    if faults and planned.spec.lint == "fail":
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        first = faults[0]
        raise VerifyFailed(
            f"not published: {first.what}; {first.engine}: {first.happens}; {first.remedy}{more}. The finished units"
            " are kept: the same command with lint=warn publishes them all the same"
        )


# --- tracking and the report


def _wait(run: Run) -> str:
    """Wait for MLflow; returns the reason if not everything was logged, else an empty text.

    The output is complete by then, so a failure to track it must not fail the job itself.
    """
    try:
        run.close()
    except StorageError as error:
        return str(error)
    return ""


def _said(planned: Planned, report: Report, run: Run, untracked: str) -> Said:
    output, address, registered = planned.journal.output, None if untracked else run.address, run.registered

    def document() -> dict[str, Any]:
        where = {"output": str(output), "tracked": address, "registered": registered}
        return {"status": "done", "already": False, **where, **report.to_json()}

    lines = [whole(f"output: {output}", style="bold green")]
    lines += [*registered_lines(registered), *run_lines(address, None if untracked else run.page)]
    if untracked:
        lines += [Text(f"the output is complete, but {untracked}", style="bold red")]
        lines += [whole(f"to send it: {program()} track {shlex.quote(str(output))}")]
    warnings = [*planned.target.warnings, *(w for w in report.warnings if w.endswith(": let pass"))]
    shown = [result.findings_text(report.lint, warnings)] if report.lint or warnings else []
    loading = loading_lines(loading_of(planned.plan, planned.target, place_of(output)))
    text = Group(result.result_text(report), *shown, *lines, *loading)
    return Said(document, text, FAILED if untracked else 0, then=planned.journal.remove, value=report)
