"""The description of a plan, as text and as a JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from jobs.planning.plan import Plan, TargetPlan
from jobs.report.document import adapter_of, imatrix_of, source_of
from jobs.report.tables import Table, size, table, times
from jobs.spec.job import JobSpec
from loaders.words import counted, in_a_line

MOST_FILES = 8  # files that a plan lists; of more, it lists the first SHOWN_FILES and the last
SHOWN_FILES = 3
MOST_CARRIED = 6  # names of other files that a plan lists


def plan_text(
    spec: JobSpec, plan: Plan, target: TargetPlan, notes: Sequence[str], *, all_tensors: bool
) -> RenderableType:
    """Render a plan as tables and notes."""
    checkpoint = plan.checkpoint
    head = Grid.grid(padding=(0, 2))
    head.add_row("source", f"{checkpoint.address}")
    files, tensors = counted(len(checkpoint.files), "file"), counted(len(plan.sources.tensors), "tensor")
    head.add_row("", f"{checkpoint.family.name} family, {checkpoint.container}, {files}, {tensors}")
    head.add_row("", f"{plan.parameters:,} parameters, {size(plan.source_bytes)}")
    head.add_row("output", str(spec.output_address))
    slack = f" (at most {target.slack_bytes} fewer)" if target.slack_bytes else ""
    head.add_row("", f"{spec.quant.name}, {counted(len(target.finals), 'file')}, {target.weight_bytes:,} bytes{slack}")
    bits = target.tensor_bytes * 8 / max(1, plan.parameters)
    head.add_row("", f"{times(plan.source_bytes / max(1, target.tensor_bytes))}, {bits:.2f} bits per weight")
    head.add_row("units", f"{len(plan.units)} of up to {size(max(unit.source_bytes for unit in plan.units))}")
    for note in notes:
        head.add_row("", note)
    anew = {"config.json", *target.made, *(["README.md"] if spec.output.card else [])}
    if carried := [name for name in plan.aux_of(target) if name not in anew]:
        sizes = sum(checkpoint.source.entry(name).size for name in carried)
        more = f" and {len(carried) - MOST_CARRIED} more" if len(carried) > MOST_CARRIED else ""
        head.add_row("beside", in_a_line(f"copied, {size(sizes)}: {', '.join(carried[:MOST_CARRIED])}{more}"))
    parts: list[RenderableType] = [head, _decision_table(target)]
    if len(target.finals) > 1:
        parts.append(_file_table(target, all_files=all_tensors))
    if all_tensors:
        parts.append(_tensor_table(target))
    parts += [Text(in_a_line(f"note: {note}"), style="cyan") for note in (*checkpoint.notes, *plan.sources.notes)]
    parts += [
        Text(in_a_line(f"note: {dropped} is tied to {kept}: written once"), style="cyan")
        for kept, dropped in plan.sources.tied
    ]
    parts += [Text(in_a_line(f"warning: {warning}"), style="yellow") for warning in target.warnings]
    return Group(*parts)


def _decision_table(target: TargetPlan) -> Table:
    numbers, prose = ("tensors", "source", "output"), ("why", "which")
    shown = table("action", *numbers, *prose, right=numbers, prose=prose)
    for row in decision_rows(target):
        sizes = size(row["source_bytes"]), size(row["output_bytes"])
        shown.add_row(row["action"], str(row["tensors"]), *sizes, row["why"], row["rule"])
    return shown


def decision_rows(target: TargetPlan) -> list[dict[str, Any]]:
    """Return the rules that decided about tensors, in their order, with the number and bytes of those tensors."""
    sizes = output_sizes(target)
    rows: dict[int, dict[str, Any]] = {}
    for decision in target.decisions:
        row = rows.get(id(decision.rule))
        if row is None:
            row = rows[id(decision.rule)] = {
                "action": decision.action,
                "rule": str(decision.rule),
                "why": decision.rule.why,
                "tensors": 0,
                "source_bytes": 0,
                "output_bytes": 0,
            }
        row["tensors"] += 1
        row["source_bytes"] += decision.tensor.source_bytes
        row["output_bytes"] += sizes.get(decision.tensor.name, 0)
    # The sort is stable: rules keep the order in which they first decided.
    return sorted(rows.values(), key=lambda row: row["action"] != "quantize")


def output_sizes(target: TargetPlan) -> dict[str, int]:
    """Return the planned bytes of each tensor."""
    return {name: sum(slot.size for slot in slots) for name, slots in target.stored.items()}


def _file_table(target: TargetPlan, *, all_files: bool) -> Table:
    """Return the table of files: of many, only the first and the last, so that warnings after it are seen."""
    numbers = ("bytes", "tensors")
    shown, files = table("file", *numbers, right=numbers), target.finals
    between = () if all_files or len(files) <= MOST_FILES else files[SHOWN_FILES:-1]
    for file in files[: SHOWN_FILES if between else None]:
        shown.add_row(file.name, f"{file.size:,}", str(len(file.slots)))
    if between:
        total, slots = sum(file.size for file in between), sum(len(file.slots) for file in between)
        shown.add_row(f"... {len(between)} more (tensors=all lists them)", f"{total:,}", str(slots))
        shown.add_row(files[-1].name, f"{files[-1].size:,}", str(len(files[-1].slots)))
    return shown


def _tensor_table(target: TargetPlan) -> Table:
    columns = ("tensor", "action", "shape", "bytes", "role", "dtype")
    shown = table(*columns, right=("bytes",), names=("tensor",), once=True)
    sizes = output_sizes(target)
    for d in target.decisions:
        shape = "x".join(map(str, d.tensor.shape))
        shown.add_row(
            d.tensor.name, d.action, shape, f"{sizes.get(d.tensor.name, 0):,}", d.tensor.role, d.tensor.dtype.torch
        )
    return shown


def plan_document(spec: JobSpec, plan: Plan, target: TargetPlan, notes: Sequence[str]) -> dict[str, Any]:
    """Describe a plan as JSON."""
    adapter, imatrix = adapter_of(plan), imatrix_of(target)
    return {
        "status": "planned",
        **({} if adapter is None else {"adapter": adapter.model_dump(mode="json")}),
        **({} if imatrix is None else {"imatrix": imatrix.model_dump(mode="json")}),
        "source": {
            **source_of(plan).model_dump(mode="json"),
            "parameters": plan.parameters,
            "bytes": plan.source_bytes,
        },
        "output": {
            "path": str(spec.output_address),
            "quant": spec.quant.name,
            "tensor_bytes": target.tensor_bytes,
            "file_bytes": target.weight_bytes,
            "slack_bytes": target.slack_bytes,
            "ratio": plan.source_bytes / max(1, target.tensor_bytes),
            "bits_per_weight": target.tensor_bytes * 8 / max(1, plan.parameters),
            "files": [{"name": file.name, "bytes": file.size, "tensors": len(file.slots)} for file in target.finals],
        },
        "rules": decision_rows(target),
        "tensors": [
            {
                "name": d.tensor.name,
                "role": d.tensor.role,
                "action": d.action,
                "why": d.rule.why,
                "dtype": d.tensor.dtype.name,
                "shape": list(d.tensor.shape),
                "source_bytes": d.tensor.source_bytes,
                "stored": [
                    {"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape), "bytes": s.size}
                    for s in target.stored.get(d.tensor.name, ())
                ],
            }
            for d in target.decisions
        ],
        "units": [
            {"id": unit.id, "source_bytes": unit.source_bytes, "tensors": len(unit.tensors)} for unit in plan.units
        ],
        "tied": [{"kept": kept, "tied": tied} for kept, tied in plan.sources.tied],
        "warnings": [*plan.checkpoint.notes, *plan.sources.notes, *target.warnings],
        "notes": list(notes),
    }
