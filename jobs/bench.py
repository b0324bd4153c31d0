"""Time the kernels beside the libraries that are installed, or a whole job beside copying and another tool."""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import Field

from jobs.console import Said, Verb
from jobs.strict import Format, Spec


class BenchSpec(Spec):
    """What to time."""

    what: Literal["kernels", "job"] = Field(description="kernels: encoders and decoders alone; job: a whole command")
    rows: int = Field(gt=0, multiple_of=4, description="kernels: rows of the weight")
    columns: int = Field(gt=0, multiple_of=64, description="kernels: its columns")
    threads: int = Field(ge=1, description="kernels: threads of each case")
    repeats: int = Field(ge=1, description="laps; in each, every case runs once, in turn")
    path: str | None = Field(description="job: the source's folder; null makes a random Llama")
    gb: float = Field(gt=0, description="job: gigabytes of the random Llama")
    quant: str = Field(description="job: the scheme")
    peer: str | None = Field(description="job: another tool's command with {source} and {output}")
    folder: str | None = Field(description="job: where outputs are written and removed again")
    format: Format = Field(description="text, or json: one document on standard output")


def act(spec: BenchSpec) -> Said:
    """Time."""
    from jobs import benching

    if spec.what == "kernels":
        return benching.kernels(spec.rows, spec.columns, spec.threads, spec.repeats)
    return benching.job(spec.path, spec.gb, spec.quant, spec.peer, spec.folder, spec.repeats)


VERB = Verb(
    "bench",
    "Time the kernels beside installed libraries, or a whole job beside copying and another tool. Ratios of one run.",
    BenchSpec,
    act,
    (
        ("kernels", "one thread, a weight of 4096 x 14336"),
        ("job gb=4 repeats=3", "a random Llama of 4 GB to NF4, from the page cache, beside copying it"),
        ("job path=DIR peer='TOOL {source} {output}'", "your checkpoint, in turn with another tool's command"),
    ),
    positional=("what",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
