"""Find what an engine will fail on in a checkpoint: weightmill lint output.path=OUT."""

from __future__ import annotations

import sys
from dataclasses import asdict

from pydantic import Field

from jobs.cli.verb import FAILED, Said, Verb
from jobs.spec.base import Format, Source, Spec
from jobs.spec.store import StoreSpec
from jobs.tracking.sources import located


class LintedFolder(Spec):
    """The checkpoint to lint."""

    path: Source = Field(description="a checkpoint, whoever wrote it")


class LintSpec(Spec):
    """The settings of `lint`."""

    output: LintedFolder
    store: StoreSpec = Field(default_factory=StoreSpec)
    format: Format = Field(description="text, or json: one document on standard output")


def act(spec: LintSpec) -> Said:
    """Lint the checkpoint; the exit status is 1 if there are faults."""
    from jobs.output.report import warnings_of
    from jobs.report.result import findings_text
    from loaders.lint import lint_at
    from loaders.storage.address import Address

    found, warnings = lint_at(spec.output.path), warnings_of(Address.of(spec.output.path))
    faults = sum(finding.level == "fault" for finding in found)
    document = {
        "status": "failed" if faults else "done",
        "output": spec.output.path,
        "faults": faults,
        "findings": [asdict(finding) for finding in found],
        "warnings": list(warnings),
    }
    return Said(document, findings_text(found, warnings), FAILED if faults else 0)


VERB = Verb(
    name="lint",
    summary="Will the engine load it? Checks any checkpoint's files, config and skip lists against what engines read.",
    spec=LintSpec,
    act=act,
    located=located,
    examples=(("OUT", "an output, or any other checkpoint; the same as output.path=OUT"),),
    positional=("output.path",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
