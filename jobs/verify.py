"""Verify an output again, later: weightmill verify output.path=OUT [model.path=DIR]."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs.cli.verb import Said, Verb
from jobs.spec.base import Format, Source, Spec
from jobs.spec.cluster import ClusterSpec
from jobs.spec.store import StoreSpec
from jobs.spec.strategy import StrategySpec
from jobs.spec.verify import VerifySpec
from jobs.tracking.sources import located
from loaders.storage.address import Address


class SourcePlace(Spec):
    """The source of the output."""

    path: Source | None = Field(description="the source's folder, if it has moved since the job")


class OutputPlace(Spec):
    """The output to verify."""

    path: Source = Field(description="the output to verify")


class VerifyRequest(Spec):
    """The settings of `verify`."""

    output: OutputPlace
    model: SourcePlace
    verify: VerifySpec
    strategy: StrategySpec
    cluster: ClusterSpec
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")


def act(spec: VerifyRequest) -> Said:
    """Verify the output; the exit status is 1 if something is wrong."""
    from jobs.verification.output import verify_output

    return verify_output(Address.of(spec.output.path), spec.model.path, spec.cluster, spec.strategy, spec.verify)


VERB = Verb(
    name="verify",
    summary="Verify an output again: every file's hash, and every tensor decoded and compared with its source.",
    spec=VerifyRequest,
    act=act,
    located=located,
    examples=(
        ("OUT", "against the source it was made from; the same as output.path=OUT"),
        ("OUT model.path=DIR", "the source has moved to DIR"),
        ("OUT verify=logits", "and what it computes in its engine; the numbers go into its report"),
        ("OUT verify=embeddings", "or, of an encoder, its hidden states: cosine and relative error"),
        ("OUT verify=logits verify.text=FILE verify.max_kl=0.05", "over your text, with a limit"),
    ),
    positional=("output.path",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
