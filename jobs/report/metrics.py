"""The metrics of a job, from its report: for MLflow, for comparison tables, for sweepers that search, for its card."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from jobs.output.damage import Damage, Judged, JudgedStates, RoleDamage, WorstTensor
from jobs.output.report import Report, ReportedTensor, Totals, stats_of
from loaders.stats import ErrorSums, finite

# A layer's number in the names of transformers, GPT-2 ("h") and llama.cpp ("blk").
LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h|blk)\.(\d+)(?:\.|$)")
WORST = 5  # the number of worst tensors that reports name


def metrics(report: Report) -> dict[str, float]:
    """Return the metrics by which runs are compared, the most important first, which is the order of MLflow's pages.

    For jobs that shared a pass (`load/jobs_in_pass` of them), time/wall_s, load/gigabytes_per_second and
    load/peak_anonymous_bytes are those of the pass; seconds by phase are a job's own, summed over its threads.
    error/relative is over all weights, as bits per weight are, so that jobs which keep different tensors can be
    compared; error/relative_changed is over the tensors that were quantized or cast.
    """
    total, run, changed = report.totals, report.run, report.totals.changed
    worst = worst_of(report.tensors)
    found = {
        "error/relative": total.relative_error,
        "size/bits_per_weight": total.bits_per_weight,
        "size/ratio": total.ratio,
        "size/output_bytes": total.output_bytes,
        "size/kept_bytes": sum(t.output_bytes for t in report.tensors if t.action != "quantize"),
        "size/source_bytes": total.source_bytes,
        "size/parameters": total.parameters,
        "error/relative_changed": changed.relative_error if changed else 0.0,
        "error/sqnr_db": total.sqnr_db,
        "error/cosine": total.cosine,
        "error/worst": worst[0].relative_error if worst else 0.0,
        "error/max": max((tensor.max_error for tensor in report.tensors), default=0.0),
        "error/sqnr_worst_db": worst[0].sqnr_db if worst else None,
        **_by_tensor(report),
        **_by_role(report),
        "time/wall_s": run.wall_s,
        **{f"time/{phase}_s": getattr(run, f"{phase}_s") for phase in ("read", "encode", "measure", "write", "upload")},
        "load/gigabytes_per_second": run.throughput_gbps,
        "load/bytes": run.bytes,
        "load/files": run.files,
        "load/tensors": run.tensors,
        "load/peak_anonymous_bytes": run.peak_anonymous_bytes,
        "load/peak_working_set_bytes": run.peak_working_set_bytes,
        "load/jobs_in_pass": run.jobs_in_pass,
        "cost/estimate": run.cost,
        "units/total": run.units,
        "units/resumed": run.units_resumed,
        "units/retries": run.retries,
        **quality_metrics(report.quality),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def quality_metrics(quality: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the metrics of verify=logits or verify=embeddings; none if the output was not evaluated."""
    return {
        f"quality/{name}": float(value) for name, value in (quality or {}).items() if isinstance(value, int | float)
    }


def _by_tensor(report: Report) -> dict[str, float | None]:
    """Return unweighted means over the quantized and cast tensors."""
    changed = [t for t in report.tensors if t.action != "keep" and t.relative_error]
    if not changed:
        return {}
    return {
        "error/relative_mean": sum(t.relative_error or 0.0 for t in changed) / len(changed),
        "error/sqnr_mean_db": sum(t.sqnr_db or 0.0 for t in changed) / len(changed),
    }


def _by_role(report: Report) -> dict[str, float | None]:
    """Return the errors of each role of tensors: attention, mlp, expert, ..."""
    sums: dict[str, ErrorSums] = {}
    for tensor in report.tensors:
        if tensor.action != "keep":
            sums[tensor.role] = sums.get(tensor.role, ErrorSums()) + tensor.sums
    return {
        **{f"error_by_class/{role}": finite(each.relative_error) for role, each in sums.items()},
        **{f"sqnr_db_by_class/{role}": finite(each.sqnr_db) for role, each in sums.items()},
    }


def table_columns(report: Report) -> dict[str, list[Any]]:
    """Return the table of all tensors, by column."""
    names = [field.name for field in fields(ReportedTensor) if field.name not in ("sums", "stored")]
    table = {name: [getattr(tensor, name) for tensor in report.tensors] for name in names}
    return {**table, "shape": ["x".join(map(str, shape)) for shape in table["shape"]]}


def error_by_layer(report: Report) -> dict[int, ErrorSums]:
    """Return the error sums over the quantized or cast tensors of each layer."""
    layers: dict[int, ErrorSums] = {}
    for tensor in report.tensors:
        match = LAYER.search(tensor.name)
        if match and tensor.action != "keep":
            layers[int(match[1])] = layers.get(int(match[1]), ErrorSums()) + tensor.sums
    return dict(sorted(layers.items()))


def worst_of(tensors: Sequence[ReportedTensor], most: int = WORST) -> list[ReportedTensor]:
    """Return the worst of some tensors by relative error, among those that are not copies."""
    changed = [t for t in tensors if t.action != "keep" and t.relative_error != 0]
    changed.sort(key=lambda t: -(t.relative_error if t.relative_error is not None else math.inf))
    return changed[:most]


# --- damage, as the report and the model card say it


def damage_of(
    tensors: Sequence[ReportedTensor], totals: Totals, engine: str, quality: Mapping[str, Any] | None
) -> Damage:
    """Sum up the damage of an output that is written for an engine."""
    changed = [tensor for tensor in tensors if tensor.action != "keep"]
    roles = {role: [t for t in changed if t.role == role] for role in sorted({t.role for t in changed})}
    return Damage(
        engine=engine,
        bits_per_weight=totals.bits_per_weight,
        relative_error=finite(totals.relative_error),
        sqnr_db=totals.sqnr_db,
        roles={role: _role(mine) for role, mine in roles.items()},
        worst=tuple(_worst(tensor) for tensor in worst_of(tensors)),
        quality=_judged(quality),
    )


def _judged(quality: Mapping[str, Any] | None) -> Judged | JudgedStates | None:
    if quality is None:
        return None
    model = Judged if "kl" in quality else JudgedStates
    return model(**{name: quality[name] for name in model.model_fields})


def _role(tensors: Sequence[ReportedTensor]) -> RoleDamage:
    found = stats_of(tensors)
    worst = worst_of(tensors)
    return RoleDamage(
        tensors=found.tensors,
        parameters=found.parameters,
        bits_per_weight=found.bits_per_weight,
        relative_error=finite(found.error.relative_error),
        sqnr_db=finite(found.error.sqnr_db),
        worst=_worst(worst[0]) if worst else None,
    )


def _worst(tensor: ReportedTensor) -> WorstTensor:
    return WorstTensor(
        name=tensor.name,
        role=tensor.role,
        relative_error=tensor.relative_error,
        sqnr_db=tensor.sqnr_db,
        max_error=tensor.max_error,
    )
