"""What a job came to: the document that stays with the output, the tables people read, the numbers that are tracked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.journal import Record, TensorRecord
from jobs.planning import FORMAT, Plan, TargetPlan
from jobs.publish import Completed
from jobs.spec import JobSpec
from loaders.lint import Finding
from loaders.stats import CompressionStats, ErrorSums, LoadStats, finite

WORST = 5
VERSIONS = ("weightmill", "numpy", "numba", "xxhash")
NOT_OF_THE_RESULT = ("output", "strategy", "cluster", "tracking", "objective", "format")


@dataclass(frozen=True, slots=True)
class Results:
    """The records of one finished target, added up."""

    records: tuple[Record, ...]

    @property
    def tensors(self) -> tuple[TensorRecord, ...]:
        return tuple(tensor for record in self.records for tensor in record.tensors)

    @property
    def load(self) -> LoadStats:
        return sum((record.load for record in self.records), LoadStats())

    def stats(self, *actions: str) -> CompressionStats:
        """Over all tensors, or over those with one of the actions."""
        return sum((t.stats for t in self.tensors if not actions or t.action in actions), CompressionStats())


# --- the document


def document(
    spec: JobSpec,
    plan: Plan,
    target: TargetPlan,
    results: Results,
    completed: Completed,
    found: Sequence[Finding],
    run: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """weightmill.json: all but `run` and `quality`, which machines compute, is the same wherever the job runs."""
    resolved = spec.resolved()
    return {
        "format": FORMAT,
        "job": {key: value for key, value in resolved.items() if key not in NOT_OF_THE_RESULT},
        "source": source_document(plan),
        "totals": totals(results),
        "files": completed.weights,
        "aux": dict(sorted(completed.aux.items())),
        "tied": [{"kept": kept, "tied": tied} for kept, tied in plan.sources.tied],
        "warnings": [*plan.checkpoint.notes, *plan.sources.notes, *target.warnings, *_let_pass(results)],
        "lint": lint_document(found),
        "tensors": [tensor_document(tensor) for tensor in results.tensors],
        "versions": versions(),
        **({} if quality is None else {"quality": quality}),
        "run": {**run, "request": resolved},
    }


def _let_pass(results: Results) -> list[str]:
    """What verify.allow_nonfinite let through."""
    said = []
    for tensor in results.tensors:
        error = tensor.error
        if error.nonfinite:
            taken = (
                f", and {error.nonfinite_decoded} more that share a scale with them" if error.nonfinite_decoded else ""
            )
            said.append(f"{tensor.name}: {error.nonfinite} weights are NaN or infinite in the source{taken}: let pass")
    return said


def source_document(plan: Plan) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    return {
        "path": str(checkpoint.root),
        "fingerprint": checkpoint.fingerprint,
        "container": checkpoint.container,
        "model_type": checkpoint.config.get("model_type"),
        "family": checkpoint.family.name,
        "files": [{"name": tag.name, "bytes": tag.size} for tag in checkpoint.files],
    }


def totals(results: Results) -> dict[str, Any]:
    """Sizes and errors of the whole, and of what was quantized or cast."""
    changed = results.stats("quantize", "cast")
    return {**results.stats().to_json(), "changed": changed.to_json() if changed.tensors else None}


def tensor_errors(error: ErrorSums) -> dict[str, Any]:
    """What follows from a tensor's sums."""
    return {
        "relative_error": finite(error.relative_error),
        "sqnr_db": finite(error.sqnr_db),
        "cosine": error.cosine,
        "max_error": error.max_error,
    }


def tensor_document(tensor: TensorRecord) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "role": tensor.role,
        "action": tensor.action,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "source_bytes": tensor.source_bytes,
        "output_bytes": tensor.output_bytes,
        **tensor_errors(tensor.error),
        "sums": asdict(tensor.error),
        "stored": {
            name: {"dtype": dtype, "shape": list(shape), "bytes": size, "xxh3": digest}
            for name, (dtype, shape, size, digest) in tensor.stored.items()
        },
    }


def versions() -> dict[str, str]:
    """Of what makes the bytes."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# --- tables


def size(count: float) -> str:
    """1_234_567 -> "1.23 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def plan_text(
    spec: JobSpec, plan: Plan, target: TargetPlan, notes: Sequence[str], *, all_tensors: bool
) -> RenderableType:
    """What would be done."""
    checkpoint = plan.checkpoint
    head = Table.grid(padding=(0, 2))
    head.add_row("source", f"{checkpoint.root}")
    head.add_row(
        "",
        f"{checkpoint.family.name} family, {checkpoint.container}, {len(checkpoint.files)} file(s),"
        f" {len(plan.sources.recipes)} tensors, {plan.parameters:,} parameters, {size(plan.source_bytes)}",
    )
    head.add_row("output", str(spec.output_path))
    head.add_row(
        "",
        f"{spec.quant.name}, {len(target.finals)} file(s), {target.weight_bytes:,} bytes"
        + (f" (at most {target.slack_bytes} fewer)" if target.slack_bytes else "")
        + f": {_times(plan.source_bytes / target.tensor_bytes)},"
        f" {target.tensor_bytes * 8 / max(1, plan.parameters):.2f} bits a weight",
    )
    head.add_row("units", f"{len(plan.units)} of up to {size(max(unit.source_bytes for unit in plan.units))}")
    for note in notes:
        head.add_row("", note)
    parts: list[RenderableType] = [head, _decision_table(target)]
    if len(target.finals) > 1:
        parts.append(_file_table(target))
    if all_tensors:
        parts.append(_tensor_table(target))
    parts += [Text(f"note: {note}", style="cyan") for note in (*checkpoint.notes, *plan.sources.notes)]
    parts += [
        Text(f"note: {dropped} is tied to {kept}: written once", style="cyan") for kept, dropped in plan.sources.tied
    ]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in target.warnings]
    return Group(*parts)


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _decision_table(target: TargetPlan) -> Table:
    table = _table("action", "tensors", "source", "output", "which", "why", right=("tensors", "source", "output"))
    for row in decision_rows(target):
        which = row["rule"] if row["own"] else f"{row['rule']}"
        table.add_row(
            row["action"], str(row["tensors"]), size(row["source_bytes"]), size(row["output_bytes"]), which, row["why"]
        )
    return table


def decision_rows(target: TargetPlan) -> list[dict[str, Any]]:
    """All rules that applied, in their order, and what each took."""
    sizes = output_sizes(target)
    rows: dict[int, dict[str, Any]] = {}
    order = {id(rule): index for index, rule in enumerate(dict.fromkeys(d.rule for d in target.decisions))}
    for decision in target.decisions:
        row = rows.setdefault(
            id(decision.rule),
            {
                "action": decision.action,
                "rule": str(decision.rule),
                "own": bool(decision.rule.label),
                "why": decision.rule.why,
                "tensors": 0,
                "source_bytes": 0,
                "output_bytes": 0,
            },
        )
        row["tensors"] += 1
        row["source_bytes"] += decision.recipe.source_bytes
        row["output_bytes"] += sizes.get(decision.recipe.name, 0)
    return [rows[key] for key in sorted(rows, key=lambda key: (rows[key]["action"] != "quantize", order.get(key, 0)))]


def output_sizes(target: TargetPlan) -> dict[str, int]:
    """Planned bytes by tensor."""
    return {name: sum(slot.size for slot in slots) for name, slots in target.stored.items()}


def _file_table(target: TargetPlan) -> Table:
    table = _table("file", "bytes", "tensors", right=("bytes", "tensors"))
    for file in target.finals:
        table.add_row(file.name, f"{file.size:,}", str(len(file.slots)))
    return table


def _tensor_table(target: TargetPlan) -> Table:
    table = _table("tensor", "role", "dtype", "shape", "action", "bytes", right=("bytes",))
    sizes = output_sizes(target)
    for d in target.decisions:
        shape = "x".join(map(str, d.recipe.shape))
        table.add_row(
            d.recipe.name, d.recipe.role, d.recipe.dtype.torch, shape, d.action, f"{sizes.get(d.recipe.name, 0):,}"
        )
    return table


def result_text(document: Mapping[str, Any]) -> RenderableType:
    """What was done, from weightmill.json."""
    run, total = document["run"], document["totals"]
    changed = total["changed"]
    table = _table("", "before", "after", "", right=("before", "after"))
    table.add_row("weights", size(total["source_bytes"]), size(total["output_bytes"]), _times(total["ratio"]))
    before = total["source_bytes"] * 8 / max(1, total["parameters"])
    table.add_row(
        "bits a weight", f"{before:.2f}", f"{total['bits_per_weight']:.2f}", f"{total['parameters']:,} parameters"
    )
    parts: list[RenderableType] = [table]
    if changed:
        parts.append(
            Text(
                f"{changed['tensors']} tensors changed: relative error {changed['relative_error']:.5f}"
                + (f" (SQNR {changed['sqnr_db']:.2f} dB)" if changed["sqnr_db"] is not None else "")
                + f", cosine {changed['cosine']:.6f}; {total['tensors'] - changed['tensors']} copied bit by bit"
            )
        )
        worst = _table(
            "worst tensors", "relative error", "SQNR dB", "max error", right=("relative error", "SQNR dB", "max error")
        )
        shown = worst_rows(document)
        for row in shown:
            sqnr = "inf" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
            error = "inf" if row["relative_error"] is None else f"{row['relative_error']:.5f}"
            worst.add_row(row["name"], error, sqnr, f"{row['max_error']:.4g}")
        parts += [worst] if shown else []
    speed = _table(
        "seconds",
        "GB/s",
        "of threads: read",
        "encode",
        "measure",
        "write",
        "peak memory, with libraries",
        "units",
        right=("seconds", "GB/s"),
    )
    speed.add_row(
        f"{run['wall_s']:.2f}", f"{run['throughput_gbps']:.2f}",
        *(f"{run[f'{phase}_s']:.2f}" for phase in ("read", "encode", "measure", "write")),
        size(run["peak_anonymous_bytes"]), f"{run['units']} ({run['units_resumed']} done before)",
    )  # fmt: skip
    parts += [speed, *([quality_text(document["quality"])] if "quality" in document else [])]
    return Group(*parts)


def quality_text(quality: Mapping[str, Any]) -> RenderableType:
    """What an output computes, against its original."""
    table = _table(f"over {quality['tokens']:,} tokens of {quality['text']}", " ", "95 %", "", right=(" ",))
    spread = f"99 % of tokens below {quality['kl_p99']:.4f}, none above {quality['kl_max']:.4f}"
    table.add_row("KL(original || output), nats a token", f"{quality['kl']:.5f}", _interval(quality, "kl"), spread)
    table.add_row(
        "perplexity, times the original's",
        f"{quality['perplexity_ratio']:.5f}",
        _interval(quality, "perplexity_ratio"),
        f"{quality['perplexity']:.4f}, the original's {quality['perplexity_original']:.4f}",
    )
    seconds = f"{quality['seconds']:.1f} s, the original {quality['reference_seconds']:.1f} s"
    table.add_row("same token most likely", f"{quality['top1']:.2%}", "", f"in {quality['engine']}; {seconds}")
    return table


def _interval(quality: Mapping[str, Any], name: str) -> str:
    return f"{quality[f'{name}_low']:.5f} to {quality[f'{name}_high']:.5f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times smaller" if ratio >= 1 or not ratio else f"{1 / ratio:.2f} times larger"


def worst_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tensors with the greatest relative error among those that are not copies."""
    changed = [t for t in document["tensors"] if t["action"] != "keep" and t["relative_error"] != 0]
    changed.sort(key=lambda t: -(t["relative_error"] if t["relative_error"] is not None else float("inf")))
    return changed[:WORST]


# --- will the engine load it?


def lint_document(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings for machines."""
    return [asdict(finding) for finding in found]


def findings_text(found: Sequence[Finding]) -> RenderableType:
    """Findings for people: what, where it matters, what to do."""
    if not found:
        return Text("no findings: nothing was found that its engine would stumble over", style="green")
    table = _table("", "what", "what will happen", "what to do")
    for finding in found:
        style = "red" if finding.level == "fault" else "yellow"
        table.add_row(
            Text(finding.level, style=style), finding.what, f"{finding.engine}: {finding.happens}", finding.remedy
        )
    return table


# --- tracking


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"quant": {"group_size": 64}} -> ("quant.group_size", 64)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
