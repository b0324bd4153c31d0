"""A job whose output is there already: what is left of it is at most its judging."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.text import Text

from jobs.cli.verb import Said, note
from jobs.orchestration.earlier import check_passed
from jobs.orchestration.preflight import Planned
from jobs.output.report import Report
from jobs.report.metrics import quality_metrics
from jobs.report.result import quality_text
from jobs.tracking.job_run import facts, run_key
from jobs.tracking.mlflow_run import first_line
from jobs.tracking.pages import registered_lines
from jobs.tracking.recorder import Recorder
from loaders.errors import StorageError


def settled(planned: Planned) -> Report:
    """Return the report of an output that is there already, after judging it if that is asked for and was not done.

    Raises:
        BadCheckpoint, VerifyFailed: it cannot be judged, or exceeds a limit.
    """
    report = planned.done
    assert report is not None
    planned.journal.remove_empty()
    if planned.judging is None:
        return report
    from jobs.verification.output import judge_published

    output = planned.journal.output
    report = judge_published(planned.judging, output, report, planned.plan, planned.spec.cluster)
    check_passed(report, planned.spec, planned.plan, output)
    return report


def notes_of(planned: Planned) -> list[str]:
    """Return a note for the plan of a job whose output is there already."""
    if planned.done is None:
        return []
    left = "only judges it" if planned.judging is not None else "does nothing"
    if planned.spec.tracking.register is not None:
        left = f"{'judges' if planned.judging is not None else 'only registers'} it"
        left += " and registers it" if planned.judging is not None else ""
    return [f"done already: the output is there, made by the same request from the same source; run {left}"]


def track(planned: Planned, report: Report) -> str | None:
    """Log what judging found to the finished run of the job that made the output, and register it if that is asked for.

    Returns models:/NAME/VERSION of what is registered.

    Raises:
        StorageError: it cannot be registered.
    """
    spec = planned.spec
    if not spec.tracking.is_on:
        return None
    if planned.judging is not None:
        _track_quality(planned, report)
    recorder = Recorder()
    try:
        return register(planned, recorder)
    finally:
        recorder.close()


def register(planned: Planned, recorder: Recorder) -> str | None:
    """Register the output if that is asked for, and is not done; returns models:/NAME/VERSION.

    Raises:
        StorageError: it cannot be registered.
    """
    spec = planned.spec
    if spec.tracking.register is None:
        return None
    told, output = facts(spec, planned.plan, planned.target), str(planned.journal.output)
    done = recorder.register(spec.tracking, spec.output.local_root, run_key(planned.journal), output, told)
    if (error := done.exception()) is not None:
        raise StorageError(f"tracking.register: the output is there, and is not registered: {first_line(error)}")
    return done.result()


def _track_quality(planned: Planned, report: Report) -> None:
    spec = planned.spec
    recorder, key, found = Recorder(), run_key(planned.journal), quality_metrics(report.quality)
    done = recorder.adopt(spec.tracking, spec.output.local_root, key, {}, found)
    recorder.close()
    if (error := done.exception()) is not None:
        note(f"the numbers are in the output's report, but not in MLflow: {(str(error).splitlines() or [''])[0]}")


def said(planned: Planned, report: Report, registered: str | None) -> Said:
    """Return the result of a job whose output was there already, and whose report is `report` now.

    `registered` is what it is in MLflow's registry, if that was asked for.
    """
    output, is_judged = str(planned.journal.output), planned.judging is not None

    def document() -> dict[str, Any]:
        return {
            "status": "done",
            "already": True,
            "output": output,
            "tracked": None,
            "registered": registered,
            **report.to_json(),
        }

    how = "only judged" if is_judged else "nothing was done"
    how = how if registered is None else "only judged and registered" if is_judged else "only registered"
    shown = [quality_text(report.quality)] if is_judged and report.quality is not None else []
    lines = [
        Text(f"done already: the same request made it from the same source, {report.run.started}; {how}"),
        Text(f"output: {output}", style="bold green"),
        *registered_lines(registered),
    ]
    return Said(document, Group(*shown, *lines), value=report)
