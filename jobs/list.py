"""List the outputs in a folder, and the jobs that are not done: weightmill list ROOT."""

from __future__ import annotations

import sys
from dataclasses import replace

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.base import Columns, Format, Location, Spec
from jobs.spec.store import StoreSpec
from loaders.storage.address import Address
from loaders.storage.settings import StoreSettings


class ListedFolder(Spec):
    """The folder to look into."""

    root: Location = Field(description="a folder of outputs, or a prefix of s3://, gs://, az://")
    journal: Location | None = Field(default=None, description="where journals of outputs on the Hub are, if not here")


class ListSpec(Spec):
    """The settings of `list`."""

    output: ListedFolder
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")
    columns: Columns = "fit"

    @property
    def store_settings(self) -> StoreSettings:
        return replace(self.store.settings, journal=self.output.journal)


def act(spec: ListSpec) -> Said:
    """Look into the folder."""
    from jobs.orchestration.status import listed

    return listed(Address.of(spec.output.root))


VERB = Verb(
    name="list",
    summary="List the outputs in a folder, and jobs under way, stopped or failed: quant, size, bits per weight, when.",
    spec=ListSpec,
    act=act,
    examples=(
        ("", "what is in ./outputs"),
        ("ROOT", "in a folder of outputs; the same as output.root=ROOT"),
        ("s3://BUCKET/DIR format=json", "in a store, for a program"),
    ),
    positional=("output.root",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
