"""Show exactly what a job would do, without writing anything: weightmill plan, with run's settings."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field

from jobs.cli.verb import DONE, FAILED, Said, Verb
from jobs.spec.job import JobSpec
from jobs.tracking.sources import located


class PlanSpec(JobSpec):
    """The settings of `plan`: those of a job, and how much of its plan to show."""

    tensors: Literal["summary", "all"] = Field(default="summary", description="all lists each one, and each file")
    check: Literal["none", "engine"] = Field(
        default="none",
        description="engine asks its own code whether it would load the output, as run does for models unknown here",
    )


def act(spec: PlanSpec) -> Said:
    """Plan the job."""
    from rich.console import Group, RenderableType

    from jobs.orchestration import already, engine_check, machines, needs, preflight
    from jobs.report import plan
    from jobs.report.result import findings_text
    from loaders.presets.auto import AutoQuant

    job: JobSpec = spec
    said: list[RenderableType] = []
    # Planning never measures: without measurements, the plan only says what the job would measure first.
    if isinstance(spec.quant, AutoQuant) and spec.quant.chosen is None:
        from jobs.mixed_precision import search

        found, mix = search.known_mix(spec)
        if found is None:
            return Said({"status": "planned", "to_be_measured": str(mix)}, mix)
        job = found
        said = [mix, ""]
    planned = preflight.plan_job(job, again=not job.output.overwrite)
    answer, about = engine_check.asked_for(planned, is_wanted=spec.check == "engine")
    notes = [*already.notes_of(planned), *needs.notes_of(planned), *machines.machines_of(planned), *about]
    status = FAILED if answer.faults and spec.lint == "fail" else DONE

    def document() -> dict[str, Any]:  # of a large model as large as its plan
        made = plan.plan_document(job, planned.plan, planned.target, notes)
        made["already"] = planned.done is not None
        made["findings"] = [asdict(finding) for finding in answer.findings]
        return made

    if spec.format == "json":
        return Said(document, "", status)
    text = plan.plan_text(job, planned.plan, planned.target, notes, all_tensors=spec.tensors == "all")
    shown = [findings_text(answer.findings)] if answer.findings else []
    return Said(document, Group(*said, text, *shown), status)


VERB = Verb(
    name="plan",
    summary="Say exactly what run would do with the same settings; writes nothing.",
    spec=PlanSpec,
    act=act,
    located=located,
    examples=(
        ("model.path=DIR quant=nf4", "files, bytes, which tensors by which rule"),
        ("model.path=DIR quant=nf4 tensors=all", "and every tensor and file"),
        ("model.path=DIR quant=nf4 check=engine", "and ask the engine's own class whether it would load that"),
        ("model.path=DIR quant=nf4 format=json", "for a program"),
    ),
    positional=("model.path",),
    config="run",
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
