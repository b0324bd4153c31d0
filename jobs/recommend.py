"""Say what to load a model as: python -m jobs.recommend model.path=DIR backend.memory_gb=24."""

from __future__ import annotations

import sys

from pydantic import Field

from jobs.console import FAILED, Said, Verb
from jobs.spec import BackendSpec, ModelSpec, SourceSpec
from jobs.strict import Format, Spec


class MemorySpec(BackendSpec):
    """conf/backend: where the model is to run."""

    memory_gb: float | None = Field(
        gt=0, description="gigabytes (1e9 bytes) for weights and all else; null: what is free here"
    )


class RecommendSpec(Spec):
    """Which model, and where it is to run."""

    model: ModelSpec
    source: SourceSpec
    backend: MemorySpec
    context_tokens: int = Field(gt=0, description="of one sequence, whose keys and values must fit beside the weights")
    format: Format = Field(description="text, or json: one document on standard output")


def act(spec: RecommendSpec) -> Said:
    """Recommend."""
    from rich.console import Group
    from rich.table import Table

    from jobs.report import size
    from loaders.checkpoint import open_checkpoint
    from loaders.errors import BadSpec
    from loaders.recommending import get_recommended_loader_config

    if spec.model.path is None:
        raise BadSpec(f"model.path: missing; give the folder that holds {spec.model.hub_id}")
    checkpoint = open_checkpoint(spec.model.path, spec.source.container)
    found = get_recommended_loader_config(
        checkpoint, spec.backend.kind, spec.backend.memory_gb, context_tokens=spec.context_tokens
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("quant", "weights", "bits a weight", "fits", ""):
        table.add_column(column, justify="left" if column in ("quant", "") else "right", overflow="fold")
    for each in found.candidates:
        weights = "-" if each.weight_bytes is None else size(each.weight_bytes)
        bits = "-" if each.bits_per_weight is None else f"{each.bits_per_weight:.2f}"
        verdict = "taken" if each.preset == found.scheme else "yes" if each.fits else "no"
        table.add_row(each.preset, weights, bits, verdict, each.why if each.weight_bytes is None else "")
    steps = [line for line in found.arithmetic if not line.startswith("  ")]
    take = [] if found.scheme is None else ["", f"quant={found.scheme} strategy={found.strategy}"]
    document = {
        "status": "failed" if found.scheme is None else "done",
        "path": str(checkpoint.root),
        **found.to_json(),
    }
    return Said(document, Group(*steps[:-1], "", table, "", steps[-1], *take), FAILED if found.scheme is None else 0)


VERB = Verb(
    "recommend",
    "Which quantization of a model fits a memory, how to read it, and the arithmetic behind it. Reads headers only.",
    RecommendSpec,
    act,
    (
        ("DIR", "for this machine; the same as model.path=DIR"),
        ("DIR backend=cuda backend.memory_gb=24", "for another one's GPU"),
        ("DIR backend=mlx backend.memory_gb=16 format=json", "for a program"),
    ),
    positional=("model.path",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
