"""Show exactly what a job would do, without writing anything: python -m jobs.plan, with the overrides of jobs.run."""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.job import JobSpec


class PlanSpec(JobSpec):
    """The settings of `plan`: those of a job, and how much of its plan to show."""

    tensors: Literal["summary", "all"] = Field(default="summary", description="all lists each one")


def act(spec: PlanSpec) -> Said:
    """Plan the job."""
    from rich.console import Group, RenderableType

    from jobs.mixed_precision import search
    from jobs.orchestration import preflight
    from jobs.report import plan
    from loaders.presets.auto import AutoQuant

    job: JobSpec = spec
    said: list[RenderableType] = []
    # Planning never measures: without measurements, the plan only says what the job would measure first.
    if isinstance(spec.quant, AutoQuant) and spec.quant.chosen is None:
        found, mix = search.known_mix(spec)
        if found is None:
            return Said({"status": "planned", "to_be_measured": str(mix)}, mix)
        job = found
        said = [mix, ""]
    planned = preflight.plan_job(job)
    notes = preflight.notes_of(planned)
    if spec.format == "json":  # only then is the document made, which of a large model is as large as its plan
        return Said(plan.plan_document(job, planned.plan, planned.target, notes), "")
    text = plan.plan_text(job, planned.plan, planned.target, notes, all_tensors=spec.tensors == "all")
    return Said({"status": "planned"}, Group(*said, text))


VERB = Verb(
    name="plan",
    summary="Say exactly what jobs.run would do with the same overrides; writes nothing.",
    spec=PlanSpec,
    act=act,
    examples=(
        ("model.path=DIR quant=nf4", "files, bytes, which tensors by which rule"),
        ("model.path=DIR quant=nf4 tensors=all", "and every tensor"),
        ("model.path=DIR quant=nf4 format=json", "for a program"),
    ),
    config="run",
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
