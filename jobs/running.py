"""A job from its spec to its report: plan, check, run what is not done, gate, publish, track."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from jobs import report
from jobs.clusters import choose
from jobs.console import FAILED, Said, note, show
from jobs.execution import Cluster, LocalCluster, UnitFailed
from jobs.journal import Record
from jobs.planning import Unit
from jobs.plots import plots
from jobs.preparing import TARGET, Planned, check_space, notes_of, plan_document, plan_job
from jobs.progress import Meter
from jobs.publish import complete, is_published, publish
from jobs.spec import ClusterSpec, JobSpec
from jobs.tracking import Run, open_run
from jobs.unit import UnitTask
from loaders.backends import devices_of
from loaders.checkpoint import OUR_REPORT, read_json
from loaders.errors import BadSpec, StorageError, VerifyFailed
from loaders.integrity import text_digest
from loaders.lint import Finding, lint_folder
from loaders.memory import PeakMemory
from loaders.quantization.gate import Gate
from loaders.strategies import WeightLoader


def run_job(spec: JobSpec) -> Said:
    """Do a job, or what is left of it.

    Raises:
        WeightmillError: see the message; what was finished stays for the next attempt.
        KeyboardInterrupt: likewise.
    """
    planned = plan_job(spec)
    show(report.plan_text(spec, planned.plan, planned.target, notes_of(planned), all_tensors=False))
    journal = planned.journal
    with journal.hold({"key": journal.key, "output": str(journal.output), "request": spec.resolved()}):
        if journal.output.exists() and not spec.output.overwrite and not is_published(journal):
            raise BadSpec(f"output.path: {journal.output} exists; output.overwrite=true replaces it")
        run = _open_run(planned)
        try:
            document = _published(planned) if is_published(journal) else _run(planned, run)
            _track(planned, run, document)
        except BaseException as error:
            _close(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            if not journal.has_records():
                journal.remove()
            elif isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(_how_to_go_on(planned)) from None
            raise
        untracked = _close(run, "FINISHED")
    return _said(planned, document, run.address, untracked)


def _run(planned: Planned, run: Run) -> dict[str, Any]:
    """Run the units that have no record, pass the gate, publish. Gives the report."""
    began, started = time.perf_counter(), time.time()
    records = resume(planned)
    resumed = len(records)
    if resumed:
        note(f"{resumed} of {len(planned.plan.units)} units were done before; going on with the rest")
    check_space(planned, planned.journal.taken_bytes)
    strategy, _ = planned.strategy
    with PeakMemory() as memory, _cluster(planned) as cluster:
        if cluster.is_local and planned.target.shared is not None:
            planned.journal.make_shared(planned.target.shared)
        fresh, retries = _execute(planned, cluster, strategy, records, run)
        where = cluster.description
    results = report.Results(tuple((records | fresh)[unit.id] for unit in planned.plan.units))
    _pass_gate(planned, results)
    completed = complete(planned.plan, planned.target, planned.journal, results.records)
    found = lint_folder(planned.journal.files)
    wall, load = time.perf_counter() - began, results.load
    document = report.document(
        planned.spec,
        planned.plan,
        planned.target,
        results,
        completed,
        found,
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "wall_s": wall,
            "throughput_gbps": sum(record.load.bytes for record in fresh.values()) / wall / 1e9,
            "read_s": load.read_s,
            "encode_s": load.encode_s,
            "measure_s": load.measure_s,
            "write_s": load.write_s,
            "bytes": load.bytes,
            "files": len(planned.plan.checkpoint.files),
            "tensors": load.tensors,
            "peak_anonymous_bytes": max(memory.peak_bytes, load.peak_anonymous_bytes),
            "units": len(planned.plan.units),
            "units_resumed": resumed,
            "retries": retries,
            "strategy": strategy.name,
            "backend": planned.backend[0],
            "cluster": where,
            "nodes": sorted({record.node for record in results.records}),
            "python": platform.python_version(),
        },
    )
    publish(planned.journal, document, overwrite=planned.spec.output.overwrite)
    return document


def resume(planned: Planned) -> dict[str, Record]:
    """The valid records of earlier attempts, by unit."""
    found = {unit.id: planned.journal.done(unit, TARGET) for unit in planned.plan.units}
    return {unit: record for unit, record in found.items() if record is not None}


@contextmanager
def _cluster(planned: Planned) -> Iterator[Cluster]:
    spec, (backend, _) = planned.spec.cluster, planned.backend
    if backend == "cuda" and spec.units_at_once is None:
        spec = spec.model_copy(update={"units_at_once": units_for_gpus(spec, len(devices_of(backend)))})
    cluster, why = choose(spec)
    if why and planned.spec.cluster.kind == "auto" and not cluster.is_local:
        note(f"units run on {cluster.description}: {why}")
    try:
        yield cluster
    finally:
        cluster.close()


def units_for_gpus(spec: ClusterSpec, gpus: int) -> int:
    """Units at once that keep every GPU of this machine at work: what the CPUs suggest, and at least two for each."""
    return max(LocalCluster(spec).units_at_once, 2 * gpus)


def _execute(
    planned: Planned, cluster: Cluster, strategy: WeightLoader, records: Mapping[str, Record], run: Run
) -> tuple[dict[str, Record], int]:
    """Run the units without a record; their records, and how many attempts were repeated.

    Raises:
        VerifyFailed: a tensor must not leave.
        StorageError: a unit could not be run.
    """
    units = [unit for unit in planned.plan.units if unit.id not in records]
    units.sort(key=lambda unit: min(strategy.priority(spec.name) for r in unit.recipes for _, spec in r.stored))
    tasks = [_task(planned, cluster, strategy, unit) for unit in units]
    cluster.check(tasks)
    fresh: dict[str, Record] = {}
    retries = 0
    with (
        Meter("quantizing", sum(task.unit.source_bytes for task in tasks)) as meter,
        closing(cluster.run(tasks, meter.add)) as outcomes,
    ):
        for outcome in outcomes:
            run.check()
            if isinstance(outcome, UnitFailed):
                raise StorageError(f"{outcome.unit}: {outcome.reason}")
            if TARGET in outcome.failures:
                raise VerifyFailed(f"not published: {outcome.failures[TARGET]}")
            fresh[outcome.unit] = outcome.records[TARGET]
            retries += outcome.attempts - 1
    return fresh, retries


def _task(planned: Planned, cluster: Cluster, strategy: WeightLoader, unit: Unit) -> UnitTask:
    spec = planned.spec
    gate = Gate(spec.verify.allow_nonfinite, spec.verify.max_relative_error)
    journals = {TARGET: (planned.journal.output, planned.journal.key)}
    root, threads, is_local = planned.plan.checkpoint.root, cluster.threads, cluster.is_local
    return UnitTask(unit, root, journals, strategy, planned.backend[0], threads, gate, in_place=is_local)


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


def _published(planned: Planned) -> dict[str, Any]:
    note(f"{planned.journal.output} was published before the job was interrupted; finishing what is left")
    return read_json(planned.journal.output / OUR_REPORT)


def _how_to_go_on(planned: Planned) -> str:
    done = len(resume(planned))
    return (
        f"interrupted; {done} of {len(planned.plan.units)} units are done and kept: the same command goes on from"
        f" there, python -m jobs.clean output.path={planned.journal.output} forgets them"
    )


# --- tracking and the report


def _open_run(planned: Planned) -> Run:
    spec = planned.spec
    params = {key: value for key, value in report.flat(spec.resolved()) if value is not None}
    tags = {
        "weightmill.kind": "job",
        "weightmill.source": planned.plan.checkpoint.fingerprint,
        "weightmill.git_commit": _git_commit(),
        **{f"weightmill.version.{name}": version for name, version in report.versions().items()},
    }
    name = spec.output_path.name
    key = text_digest(f"{planned.journal.key} {planned.journal.output}")
    return open_run(spec.tracking, Path(spec.output.root), name, params, tags, key)


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
    run.metrics(report.metrics(document))
    run.series(
        "layer/relative_error", [(layer, e.relative_error) for layer, e in report.error_by_layer(document).items()]
    )
    run.table("tensors.json", report.table_columns(document))
    run.document("plan.json", plan_document(planned, notes_of(planned)))
    run.document(OUR_REPORT, document)
    run.figures(lambda folder: plots(document, folder))


def _close(run: Run, status: str) -> str:
    """End the run; why it does not hold everything, if so."""
    try:
        run.close(status)
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
