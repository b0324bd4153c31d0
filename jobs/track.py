"""Send to MLflow what a finished job could not log: weightmill track OUT."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.base import Format, LocalPath, Location, Spec
from jobs.spec.store import StoreSpec
from jobs.spec.tracking import TrackingSpec
from loaders.storage.address import Address


class TrackedOutput(Spec):
    """The output to track."""

    path: Location = Field(description="a finished output")
    root: LocalPath | None = Field(
        default=None, description="the folder of mlflow.db if tracking.uri is not given; null: as the job had it"
    )


class TrackSpec(Spec):
    """The settings of `track`."""

    output: TrackedOutput
    tracking: TrackingSpec
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")


def act(spec: TrackSpec) -> Said:
    """Send the output's report to MLflow."""
    from jobs.orchestration.track import track

    return track(Address.of(spec.output.path), spec.tracking, spec.output.root)


VERB = Verb(
    name="track",
    summary="Send to MLflow what a finished job could not log, as when the server was gone, or tracking=none: its run"
    " goes on, or a new one is made. Twice is harmless.",
    spec=TrackSpec,
    act=act,
    examples=(
        ("OUT", "to where the job was tracked; the same as output.path=OUT"),
        ("OUT tracking.uri=http://HOST:5000", "to a server"),
    ),
    positional=("output.path",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
