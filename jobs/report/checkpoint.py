"""The description of a checkpoint's contents, as a JSON document and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from jobs.report.tables import in_a_line, size, table
from loaders.architectures.diffusers import class_of
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.tensors.quantized_sources.consistency import stale
from loaders.tensors.sources import Sources
from loaders.words import counted

SHOWN = 100  # names of other files


def checkpoint_document(checkpoint: Checkpoint, sources: Sources) -> dict[str, Any]:
    """Describe a checkpoint, its files and all its tensors as JSON."""
    contradiction = stale(checkpoint)
    return {
        "status": "done",
        "path": str(checkpoint.address),
        "container": checkpoint.container,
        "model_type": checkpoint.config.get("model_type"),
        "family": checkpoint.family.name,
        "class": class_of(checkpoint.config),
        "components": {part: _component(each) for part, each in checkpoint.components.items()},
        "quantization": checkpoint.quantized_by if contradiction is None else None,
        "parameters": sources.parameters,
        "bytes": checkpoint.size,
        "fingerprint": checkpoint.fingerprint,
        "files": [{"name": tag.name, "bytes": tag.size} for tag in checkpoint.files],
        "aux": list(checkpoint.aux),
        "tied": [{"kept": kept, "tied": tied} for kept, tied in sources.tied],
        "notes": [*([] if contradiction is None else [contradiction]), *checkpoint.notes, *sources.notes],
        "tensors": [
            {
                "name": r.name,
                "role": r.role,
                "dtype": r.dtype.name,
                "shape": list(r.shape),
                "stored_as": r.stored_as,
                "parameters": r.spec.numel,
                "bytes": r.source_bytes,
                "file": r.stored[0][1].file,
                "group": r.group,
            }
            for r in sources.tensors
        ],
    }


def _component(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a component of a pipeline: its class, or the type of its model."""
    named = class_of(checkpoint.config) or checkpoint.config.get("model_type")
    return {
        "class": named if isinstance(named, str) else None,
        "quantization": checkpoint.quantized_by,
        "tensors": len(checkpoint.weights),
        "bytes": checkpoint.size,
    }


def checkpoint_text(document: Mapping[str, Any], *, all_tensors: bool) -> RenderableType:
    """Render the description of a checkpoint as tables: a summary by role, or every tensor."""
    named = in_a_line(document["class"] or f"model_type {document['model_type']}")
    head = (
        f"{document['path']}\n{document['family']} family ({named}),"
        f" {document['container']}, {counted(len(document['files']), 'file')},"
        f" {counted(len(document['tensors']), 'tensor')},"
        f" {document['parameters']:,} parameters, {size(document['bytes'])}"
        + (f", quantized by {document['quantization']}" if document["quantization"] else "")
    )
    ties = [f"{pair['tied']} is tied to {pair['kept']}" for pair in document["tied"]]
    names = document["aux"]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    aux = f"other files: {', '.join(names[:SHOWN]) or 'none'}{more}"
    shown = _every_tensor(document) if all_tensors else _by_role(document)
    parts = [_by_component(document)] if document["components"] else []
    return Group(head, *parts, shown, *map(in_a_line, [*ties, aux, *document["notes"]]))


def _by_component(document: Mapping[str, Any]) -> RenderableType:
    shown = table("component", "bytes", "stored tensors", "quantized by", "class", right=("stored tensors", "bytes"))
    for part, each in document["components"].items():
        row = (size(each["bytes"]), str(each["tensors"]), each["quantization"] or "", each["class"] or "")
        shown.add_row(part, *row)
    return shown


def _every_tensor(document: Mapping[str, Any]) -> RenderableType:
    right, names = ("bytes",), ("tensor", "file")
    shown = table("tensor", "stored as", "shape", "bytes", "role", "dtype", "file", right=right, names=names, once=True)
    for row in document["tensors"]:
        shape = "x".join(map(str, row["shape"]))
        shown.add_row(row["name"], row["stored_as"], shape, f"{row['bytes']:,}", row["role"], row["dtype"], row["file"])
    return shown


def _by_role(document: Mapping[str, Any]) -> RenderableType:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in document["tensors"]:
        groups.setdefault((row["role"], row["stored_as"]), []).append(row)
    counts = ("tensors", "parameters", "bytes")
    shown = table("role", "stored as", *counts, right=counts)
    for (role, kind), found in groups.items():
        numel, count = sum(row["parameters"] for row in found), sum(row["bytes"] for row in found)
        shown.add_row(role, kind, str(len(found)), f"{numel:,}", size(count))
    return shown
