"""Say how a job or an output stands, from anywhere: weightmill status OUT."""

from __future__ import annotations

import sys
from dataclasses import replace

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.base import Columns, Format, Location, Spec
from jobs.spec.store import StoreSpec
from loaders.storage.address import Address
from loaders.storage.settings import StoreSettings


class WatchedOutput(Spec):
    """The output to look at, and where its journal may be."""

    path: Location = Field(description="the output, finished or under way: a folder, or a URL of a store")
    journal: Location | None = Field(default=None, description="where journals of outputs on the Hub are, if not here")


class StatusSpec(Spec):
    """The settings of `status`."""

    output: WatchedOutput
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")
    columns: Columns = "fit"

    @property
    def store_settings(self) -> StoreSettings:
        return replace(self.store.settings, journal=self.output.journal)


def act(spec: StatusSpec) -> Said:
    """Look at the output and its journal; nothing of them is changed."""
    from jobs.orchestration.status import status

    return status(Address.of(spec.output.path))


VERB = Verb(
    name="status",
    summary="Say how a job stands, from its journal, on any machine: units, rate, machines, the driver's last sign of"
    " life. Exit status 0 if the output is complete or a job at work on it, 1 if work is left and nobody does it.",
    spec=StatusSpec,
    act=act,
    examples=(
        ("OUT", "of an output, finished or under way; the same as output.path=OUT"),
        ("s3://BUCKET/OUT format=json", "in a store, for a program"),
        ("hf://OWNER/NAME output.journal=s3://BUCKET/JOURNALS", "on the Hub, with its journal elsewhere"),
    ),
    positional=("output.path",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
