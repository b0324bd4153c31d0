"""Compare two checkpoints tensor by tensor, quantized ones decoded: weightmill diff A B."""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.base import Columns, Format, Source, Spec
from jobs.spec.store import StoreSpec
from jobs.tracking.sources import located


class DiffSpec(Spec):
    """The settings of `diff`."""

    a: Source = Field(description="the first checkpoint: errors are relative to it")
    b: Source = Field(description="the second checkpoint")
    tensors: Literal["different", "all"] = Field(description="which tensors to list")
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")
    columns: Columns = "fit"


def act(spec: DiffSpec) -> Said:
    """Compare the two checkpoints."""
    from jobs.verification.diff import compare_checkpoints

    return compare_checkpoints(spec.a, spec.b, all_tensors=spec.tensors == "all")


VERB = Verb(
    name="diff",
    summary="Compare two checkpoints tensor by tensor: equal, or how far apart. Quantized ones are decoded. Exit status"
    " 1 if they differ.",
    spec=DiffSpec,
    act=act,
    located=located,
    examples=(
        ("A B", "the tensors that differ, of many those that differ most"),
        ("A B tensors=all", "all of them"),
    ),
    positional=("a", "b"),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
