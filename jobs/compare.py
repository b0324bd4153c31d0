"""Compare finished jobs: weightmill compare sweep=last."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.base import Columns, Format, LocalPath, Spec
from jobs.spec.store import StoreSpec
from jobs.spec.tracking import TrackingSpec


class ComparePlace(Spec):
    """The folder of the default tracking store, and the folder of the comparison."""

    root: LocalPath = Field(description="the folder whose mlflow.db is read if tracking.uri is not given")
    path: LocalPath | None = Field(
        description="the comparison's folder; root / comparisons / SWEEP by default, or the runs' names"
    )


class CompareSpec(Spec):
    """The settings of `compare`."""

    sweep: str = Field(description="last, a sweep's name, or all: every run of the experiment")
    runs: tuple[str, ...] = Field(description="run ids, run names, or folders of outputs, in place of a sweep")
    filter: str = Field(description="MLflow's filter, such as metrics.`size/bits_per_weight` < 5")
    error: str | None = Field(
        description="the metric to compare with bits per weight; null: of each model what all its jobs were judged by"
    )
    tracking: TrackingSpec
    output: ComparePlace
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")
    columns: Columns = "fit"


def act(spec: CompareSpec) -> Said:
    """Compare the requested jobs."""
    from jobs.orchestration.compare import compare

    return compare(
        spec.tracking, spec.output.root, spec.output.path, sweep=spec.sweep, runs=spec.runs, where=spec.filter,
        error=spec.error,
    )  # fmt: skip


VERB = Verb(
    name="compare",
    summary="Compare jobs: sizes, errors, times, the Pareto front, error by layer, the tensors that differ most.",
    spec=CompareSpec,
    act=act,
    examples=(
        ("", "the last sweep"),
        ("sweep=all tracking.experiment=NAME", "every run of an experiment"),
        ("outputs/demo-nf4 outputs/demo-fp4", "these outputs, tracked or not; the same as runs=[...]"),
        ("sweep=all 'filter=metrics.`size/bits_per_weight` < 5'", "the small ones"),
        ("tracking.uri=http://HOST:5000", "on a server"),
    ),
    gathered="runs",
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
