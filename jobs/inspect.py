"""Show what a checkpoint holds, from its headers: weightmill inspect model.path=DIR."""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.base import Columns, Format, Spec
from jobs.spec.job import ModelSpec, SourceSpec
from jobs.spec.store import StoreSpec
from jobs.tracking.sources import located


class InspectSpec(Spec):
    """The settings of `inspect`."""

    model: ModelSpec
    source: SourceSpec
    tensors: Literal["summary", "all"] = Field(description="all lists each one")
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")
    columns: Columns = "fit"


def act(spec: InspectSpec) -> Said:
    """Read the checkpoint's headers and describe them."""
    from jobs.report.checkpoint import checkpoint_document, checkpoint_text
    from loaders.checkpoints.checkpoint import open_checkpoint
    from loaders.tensors.sources import tensors_of

    checkpoint = open_checkpoint(spec.model.address, spec.source.container)
    document = checkpoint_document(checkpoint, tensors_of(checkpoint, decode=True, check=False))
    return Said(document, checkpoint_text(document, all_tensors=spec.tensors == "all"))


VERB = Verb(
    name="inspect",
    summary="Say what a checkpoint holds: tensors, roles, dtypes, sizes, ties. Reads headers only.",
    spec=InspectSpec,
    act=act,
    located=located,
    examples=(
        ("DIR", "a summary by role; the same as model.path=DIR"),
        ("DIR tensors=all", "every tensor"),
    ),
    positional=("model.path",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
