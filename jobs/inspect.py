"""Say what a checkpoint holds, from its headers: python -m jobs.inspect model.path=DIR."""

from __future__ import annotations

import sys
from typing import Any, Literal

from pydantic import Field

from jobs.console import Said, Verb
from jobs.spec import ModelSpec, SourceSpec
from jobs.strict import Format, Spec


class InspectSpec(Spec):
    """Which checkpoint, and how much of it to show."""

    model: ModelSpec
    source: SourceSpec
    tensors: Literal["summary", "all"] = Field(description="all lists each one")
    format: Format = Field(description="text, or json: one document on standard output")


def act(spec: InspectSpec) -> Said:
    """Inspect."""
    from rich.console import Group
    from rich.table import Table

    from jobs.report import size
    from loaders.checkpoint import open_checkpoint
    from loaders.decoding import method_of
    from loaders.errors import BadSpec
    from loaders.sources import recipes_of

    if spec.model.path is None:
        raise BadSpec(f"model.path: missing; give the folder that holds {spec.model.hub_id}")
    checkpoint = open_checkpoint(spec.model.path, spec.source.container)
    sources = recipes_of(checkpoint, decode=True)
    rows: list[dict[str, Any]] = [
        {
            "name": r.name,
            "role": r.role,
            "dtype": r.dtype.name,
            "shape": list(r.shape),
            "stored_as": r.decode.kind if r.decode else r.dtype.name,
            "bytes": r.source_bytes,
            "file": r.stored[0][1].file,
            "group": r.group,
        }
        for r in sources.recipes
    ]
    document: dict[str, Any] = {
        "status": "done",
        "path": str(checkpoint.root),
        "container": checkpoint.container,
        "model_type": checkpoint.config.get("model_type"),
        "family": checkpoint.family.name,
        "quantization": method_of(checkpoint),
        "parameters": sum(r.spec.numel for r in sources.recipes if r.dtype.is_float),
        "bytes": checkpoint.size,
        "fingerprint": checkpoint.fingerprint,
        "files": [{"name": tag.name, "bytes": tag.size} for tag in checkpoint.files],
        "aux": list(checkpoint.aux),
        "tied": [{"kept": kept, "tied": tied} for kept, tied in sources.tied],
        "notes": [*checkpoint.notes, *sources.notes],
        "tensors": rows,
    }
    head = (
        f"{checkpoint.root}\n{checkpoint.family.name} family (model_type {document['model_type']}),"
        f" {checkpoint.container}, {len(checkpoint.files)} file(s), {len(rows)} tensors,"
        f" {document['parameters']:,} parameters, {size(checkpoint.size)}"
        + (f", quantized by {document['quantization']}" if document["quantization"] else "")
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns: tuple[str, ...] = ("role", "stored as", "tensors", "parameters", "bytes")
    if spec.tensors == "all":
        columns = ("tensor", "role", "stored as", "dtype", "shape", "bytes", "file")
    for column in columns:
        table.add_column(
            column, overflow="fold", justify="right" if column in ("tensors", "parameters", "bytes") else "left"
        )
    if spec.tensors == "all":
        for row in rows:
            shape = "x".join(map(str, row["shape"]))
            table.add_row(
                row["name"], row["role"], row["stored_as"], row["dtype"], shape, f"{row['bytes']:,}", row["file"]
            )
    else:
        groups: dict[tuple[str, str], list[Any]] = {}
        for recipe, row in zip(sources.recipes, rows, strict=True):
            groups.setdefault((row["role"], row["stored_as"]), []).append(recipe)
        for (role, kind), found in groups.items():
            numel, count = sum(r.spec.numel for r in found), sum(r.source_bytes for r in found)
            table.add_row(role, kind, str(len(found)), f"{numel:,}", size(count))
    ties = [f"{pair['tied']} is tied to {pair['kept']}" for pair in document["tied"]]
    aux = f"other files: {', '.join(checkpoint.aux) or 'none'}"
    return Said(document, Group(head, table, *ties, aux, *document["notes"]))


VERB = Verb(
    "inspect",
    "Say what a checkpoint holds: tensors, roles, dtypes, sizes, ties. Reads headers only.",
    InspectSpec,
    act,
    (
        ("DIR", "a summary by role; the same as model.path=DIR"),
        ("DIR tensors=all", "every tensor"),
    ),
    positional=("model.path",),
)
main = VERB.main

if __name__ == "__main__":
    sys.exit(main())
