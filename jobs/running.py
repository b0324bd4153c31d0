"""A job from its spec to its report: plan, check, run what is not done, gate, publish, track.

`Job` is one job under way; jobs/passing.py takes one, or several over the same source, through their units.
"""

from __future__ import annotations

import getpass
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from jobs import report
from jobs.console import FAILED, Said, note
from jobs.journal import Record
from jobs.judging import judged, pass_gate
from jobs.metrics import error_by_layer, metrics, quality_metrics, table_columns
from jobs.mixing import mix_document
from jobs.plots import plots
from jobs.preparing import TARGET, Planned, notes_of, plan_document
from jobs.publish import complete, is_published, publish
from jobs.tracking import SWEEP, NoRun, Recorder, Run, open_run
from jobs.unit import Share
from loaders.auto_quant import AutoQuant
from loaders.checkpoint import OUR_REPORT, read_json
from loaders.errors import BadCheckpoint, BadSpec, StorageError, VerifyFailed, WeightmillError
from loaders.integrity import text_digest
from loaders.lint import Finding, lint_folder
from loaders.quantization.gate import Gate

CHOSEN = "quant.chosen."  # every tensor by name: it is an artifact, not a parameter


@dataclass(frozen=True)
class Pass:
    """What a pass took as a whole, for all its jobs."""

    started: float
    wall_s: float
    peak_bytes: int
    cluster: str
    strategy: str
    jobs: int


class Job:
    """One job of a pass. After `finish`, `fail` or `stop` there is an `outcome`."""

    def __init__(self, number: int, planned: Planned, sweep: str | None = None) -> None:
        self.number = number
        self.planned = planned
        self.sweep = sweep
        self.run: Run = NoRun()
        self.records: dict[str, Record] = {}
        self.resumed: frozenset[str] = frozenset()
        self.retries = 0
        self._is_held = False
        self.outcome: Said | WeightmillError | None = None
        self.document: Mapping[str, Any] | None = planned.done

    @property
    def is_whole(self) -> bool:
        """Whether its output has its name already, and only what comes after is left."""
        return is_published(self.planned.journal)

    def begin(self, stack: ExitStack, recorder: Recorder | None) -> None:
        """Keep other processes out until the stack is closed, open the run, and find what was done before.

        Raises:
            WeightmillError: it cannot be done now.
        """
        journal, spec = self.planned.journal, self.planned.spec
        request = {"key": journal.key, "output": str(journal.output), "request": spec.resolved()}
        stack.enter_context(journal.hold(request))
        self._is_held = True
        if journal.output.exists() and not spec.output.overwrite and not self.is_whole:
            raise BadSpec(f"output.path: {journal.output} exists; output.overwrite=true replaces it")
        self.run = self._open_run(recorder)
        if self.is_whole:
            note(f"{journal.output} was published before the job was interrupted; finishing what is left")
            return
        self.records = resume(self.planned)
        self.resumed = frozenset(self.records)
        if self.records:
            units = len(self.planned.plan.units)
            note(f"{len(self.records)} of {units} units were done before; going on with the rest")

    def shares(self) -> list[tuple[int, Share]]:
        """What is left to do."""
        if self.is_whole or self.outcome is not None:
            return []
        journal = self.planned.journal
        return [
            (self.number, Share(unit, TARGET, journal.output, journal.key, self._gate))
            for unit in self.planned.plan.units
            if unit.id not in self.records
        ]

    @property
    def _gate(self) -> Gate:
        verify = self.planned.spec.verify
        return Gate(verify.allow_nonfinite, verify.max_relative_error)

    def finish(self, done: Pass) -> None:
        """Pass the gate, publish, and hand the report to MLflow.

        Raises:
            WeightmillError: it may not be published.
        """
        if self.is_whole:
            self.document = read_json(self.planned.journal.output / OUR_REPORT)
        else:
            self.document = self._publish(done)
        _track(self.planned, self.run, self.document)
        self.run.end("FINISHED")

    def _publish(self, done: Pass) -> dict[str, Any]:
        planned = self.planned
        results = report.Results(tuple(self.records[unit.id] for unit in planned.plan.units))
        _pass_gate(planned, results)
        completed = complete(planned.plan, planned.target, planned.journal, results.records)
        quality = self._judge([row["xxh3"] for row in completed.weights])
        found = lint_folder(planned.journal.files)
        document = report.document(
            planned.spec, planned.plan, planned.target, results, completed, found, self._about(done, results), quality
        )
        publish(planned.journal, document, overwrite=planned.spec.output.overwrite)
        return document

    def _judge(self, digests: Sequence[str]) -> dict[str, Any] | None:
        """With verify=logits, what the finished files compute; the numbers of one that fails are tracked, too.

        Raises:
            VerifyFailed: it is beyond a limit, or its engine computes nothing of use.
        """
        judging, journal = self.planned.judging, self.planned.journal
        if judging is None:
            return None
        try:
            quality = judged(judging, journal.files, journal.output.name, journal.root, digests).to_json()
        except BadCheckpoint as error:
            raise VerifyFailed(f"not published: {error}") from error
        try:
            pass_gate(judging.spec, quality, journal.output)
        except VerifyFailed:
            self.run.metrics(quality_metrics({"quality": quality}))
            raise
        return quality

    def _about(self, done: Pass, results: report.Results) -> dict[str, Any]:
        """The report's `run`: when, where and how fast."""
        load, nodes = results.load, sorted({record.node for record in results.records})
        fresh = sum(record.load.bytes for unit, record in self.records.items() if unit not in self.resumed)
        price = self.planned.spec.tracking.price_per_hour
        machines = len({record.node for unit, record in self.records.items() if unit not in self.resumed})
        return {
            "key": self.planned.journal.key,
            "sweep": self.sweep,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(done.started)),
            "wall_s": done.wall_s,
            "throughput_gbps": fresh / done.wall_s / 1e9,
            "read_s": load.read_s,
            "encode_s": load.encode_s,
            "measure_s": load.measure_s,
            "write_s": load.write_s,
            "bytes": load.bytes,
            "files": len(self.planned.plan.checkpoint.files),
            "tensors": load.tensors,
            "peak_anonymous_bytes": max(done.peak_bytes, load.peak_anonymous_bytes),
            "units": len(self.planned.plan.units),
            "units_resumed": len(self.resumed),
            "retries": self.retries,
            "jobs_in_pass": done.jobs,
            "cost": None if price is None else price * machines * done.wall_s / 3600 / done.jobs,
            "strategy": done.strategy,
            "backend": self.planned.backend[0],
            "cluster": done.cluster,
            "nodes": nodes,
            "python": platform.python_version(),
        }

    def fail(self, error: WeightmillError) -> None:
        """It is over, and units begun from now on leave it out; what it finished stays for the next attempt."""
        self.outcome = error
        self.run.end("FAILED")
        if self._is_held:
            self.planned.journal.leave_out()

    def stop(self, *, killed: bool) -> None:
        """Something ends the whole pass."""
        self.run.end("KILLED" if killed else "FAILED")
        self._tidy()

    def _tidy(self) -> None:
        """Wait until all is tracked; a job that finished no unit leaves nothing behind."""
        _wait(self.run)
        if self._is_held and not self.planned.journal.has_records():
            self.planned.journal.remove()

    def settle(self) -> None:
        """Wait until all is tracked, and say what came of it."""
        if self.outcome is None and self.document is not None:
            untracked = _wait(self.run)
            address = None if untracked else self.run.address
            self.outcome = _said(self.planned, self.document, address, untracked)
        elif self.outcome is not None:
            self._tidy()

    @property
    def how_to_go_on(self) -> str:
        done, units = len(resume(self.planned)), len(self.planned.plan.units)
        return (
            f"interrupted; {done} of {units} units are done and kept: the same command goes on from there,"
            f" python -m jobs.clean output.path={self.planned.journal.output} forgets them"
        )

    def _open_run(self, recorder: Recorder | None) -> Run:
        spec, planned = self.planned.spec, self.planned
        params = {k: v for k, v in report.flat(spec.resolved()) if v is not None and not k.startswith(CHOSEN)}
        tags = {
            "weightmill.kind": "job",
            "weightmill.source": planned.plan.checkpoint.fingerprint,
            "weightmill.output": str(planned.journal.output),
            "weightmill.git_commit": _git_commit(),
            **_shown_by_mlflow(),
            **{f"weightmill.version.{name}": version for name, version in report.versions().items()},
            **sweep_tags(self.sweep, self.number),
        }
        root, name = Path(spec.output.root), spec.output_path.name
        return open_run(spec.tracking, root, name, params, tags, run_key(planned), recorder)


def sweep_tags(sweep: str | None, number: int) -> dict[str, str]:
    """What tells of a run that it belongs to a sweep."""
    return {} if sweep is None else {SWEEP: sweep, f"{SWEEP}.job": str(number)}


def run_key(planned: Planned) -> str:
    """Names the job in MLflow: one output of one plan."""
    return text_digest(f"{planned.journal.key} {planned.journal.output}")


def resume(planned: Planned) -> dict[str, Record]:
    """The valid records of earlier attempts, by unit."""
    found = {unit.id: planned.journal.done(unit, TARGET) for unit in planned.plan.units}
    return {unit: record for unit, record in found.items() if record is not None}


def _pass_gate(planned: Planned, results: report.Results) -> None:
    """The gate once more, over all records: those of earlier attempts may have passed a wider one.

    Raises:
        VerifyFailed: naming the worst tensor.
    """
    gate = Gate(planned.spec.verify.allow_nonfinite, planned.spec.verify.max_relative_error)
    schemes = {d.recipe.name: d.scheme for d in planned.target.decisions if d.scheme is not None}
    faults = [(t.error.relative_error, gate.fault(t.name, t.error, schemes[t.name])) for t in results.tensors]
    found = [(error, fault) for error, fault in faults if fault]
    if found:
        raise VerifyFailed(f"not published: {max(found)[1]} (the worst of {len(found)})")


# --- tracking and the report


@cache
def _shown_by_mlflow() -> dict[str, str]:
    """Tags from which its pages tell who made a run, and with what."""
    found = {"mlflow.source.name": "python -m jobs.run", "mlflow.source.type": "LOCAL"}
    if _git_commit() != "none":
        found["mlflow.source.git.commit"] = _git_commit()
    with suppress(KeyError, OSError):  # a user without a name, as in many containers
        found["mlflow.user"] = getpass.getuser()
    return found


@cache
def _git_commit() -> str:
    """The commit of this checkout of weightmill, or "none" for an installed one."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return "none"
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


def _track(planned: Planned, run: Run, document: Mapping[str, Any]) -> None:
    """Log the report."""
    if not run.is_tracked:
        return
    run.describe(_description(planned, document))
    run.metrics(metrics(document))
    run.series("layer/relative_error", [(layer, e.relative_error) for layer, e in error_by_layer(document).items()])
    run.table("tensors.json", table_columns(document))
    run.document("plan.json", plan_document(planned, notes_of(planned)))
    run.document(OUR_REPORT, document)
    if isinstance(planned.spec.quant, AutoQuant):
        run.document("mix.json", mix_document(planned.spec.quant, planned.target.decisions))
    run.figures(lambda folder: plots(document, folder))


def _description(planned: Planned, document: Mapping[str, Any]) -> str:
    """What came of the job, in a few words of Markdown."""
    total = document["totals"]
    error = (total["changed"] or {}).get("relative_error", 0.0)
    return (
        f"**{planned.spec.model_name} to {planned.spec.quant.name}**: {total['bits_per_weight']:.3f} bits a weight,"
        f" {total['ratio']:.2f} times smaller, relative error {error:.5f}.\n\nOutput: `{planned.journal.output}`\n\n"
        "Error by layer: Model metrics, `layer/relative_error`. Every tensor: Artifacts, `tensors.json`."
    )


def _wait(run: Run) -> str:
    """Wait for MLflow; why it does not hold everything, if so."""
    try:
        run.close()
    except StorageError as error:
        return str(error)
    return ""


def _said(planned: Planned, document: Mapping[str, Any], address: str | None, untracked: str) -> Said:
    output = planned.journal.output
    found = {"status": "done", "output": str(output), "tracked": address, **document}
    lines = [Text(f"output: {output}", style="bold green")]
    lines += [Text(f"run: {address}")] if address else []
    lines += [Text(f"the output is complete, but {untracked}", style="bold red")] if untracked else []
    findings = [Finding(**row) for row in document["lint"]]
    shown = [report.findings_text(findings)] if findings else []
    let_pass = [Text(f"warning: {w}", style="yellow") for w in document["warnings"] if w.endswith(": let pass")]
    text = Group(report.result_text(document), *let_pass, *shown, *lines)
    return Said(found, text, FAILED if untracked else 0, then=planned.journal.remove)
