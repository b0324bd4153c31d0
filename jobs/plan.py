"""Say exactly what a job would do: python -m jobs.plan, with the overrides of jobs.run. Writes nothing."""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from jobs.console import Said, Verb
from jobs.spec import JobSpec


class PlanSpec(JobSpec):
    """A job, and how much of its plan to show."""

    tensors: Literal["summary", "all"] = Field(default="summary", description="all lists each one")


def act(spec: PlanSpec) -> Said:
    """Plan the job."""
    from rich.console import Group, RenderableType

    from jobs import budgeting, preparing, report
    from loaders.auto_quant import AutoQuant

    job: JobSpec = spec
    said: list[RenderableType] = []
    if isinstance(spec.quant, AutoQuant) and spec.quant.chosen is None:
        found = budgeting.known_mix(spec)
        if not isinstance(found, tuple):
            return Said({"status": "planned", "to_be_measured": str(found)}, found)
        job, mix = found
        said = [mix, ""]
    planned = preparing.plan_job(job)
    notes = preparing.notes_of(planned)
    text = report.plan_text(job, planned.plan, planned.target, notes, all_tensors=spec.tensors == "all")
    return Said(preparing.plan_document(planned, notes), Group(*said, text))


VERB = Verb(
    "plan",
    "Say exactly what jobs.run would do with the same overrides; writes nothing.",
    PlanSpec,
    act,
    (
        ("model.path=DIR quant=nf4", "files, bytes, which tensors by which rule"),
        ("model.path=DIR quant=nf4 tensors=all", "and every tensor"),
        ("model.path=DIR quant=nf4 format=json", "for a program"),
    ),
    config="run",
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
