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
from jobs.tracking.job_run import run_key
from jobs.tracking.recorder import Recorder


def settled(planned: Planned) -> Report:
    """Return the report of an output that is there already, after judging it if that is asked for and was not done.

    Raises:
        BadCheckpoint, VerifyFailed: it cannot be judged, or exceeds a limit.
    """
    report = planned.done
    assert report is not None
    if planned.judging is None:
        return report
    from jobs.verification.output import judge_published

    output = planned.journal.output
    report = judge_published(planned.judging, output, report, planned.plan)
    check_passed(report, planned.spec, planned.plan, output)
    return report


def notes_of(planned: Planned) -> list[str]:
    """Return a note for the plan of a job whose output is there already."""
    if planned.done is None:
        return []
    left = "only judges it" if planned.judging is not None else "does nothing"
    return [f"done already: the output is there, made by the same request from the same source; run {left}"]


def track(planned: Planned, report: Report) -> None:
    """Log what judging found to the finished run of the job that made the output, if there is one."""
    spec = planned.spec
    if planned.judging is None or spec.tracking.kind == "none":
        return
    recorder, key, found = Recorder(), run_key(planned.journal), quality_metrics(report.quality)
    done = recorder.adopt(spec.tracking, spec.output.local_root, key, {}, found)
    recorder.close()
    if (error := done.exception()) is not None:
        note(f"the numbers are in the output's report, but not in MLflow: {(str(error).splitlines() or [''])[0]}")


def said(planned: Planned, report: Report) -> Said:
    """Return the result of a job whose output was there already, and whose report is `report` now."""
    output, is_judged = str(planned.journal.output), planned.judging is not None

    def document() -> dict[str, Any]:
        return {"status": "done", "already": True, "output": output, "tracked": None, **report.to_json()}

    how = "only judged" if is_judged else "nothing was done"
    shown = [quality_text(report.quality)] if is_judged and report.quality is not None else []
    lines = [
        Text(f"done already: the same request made it from the same source, {report.run.started}; {how}"),
        Text(f"output: {output}", style="bold green"),
    ]
    return Said(document, Group(*shown, *lines))
