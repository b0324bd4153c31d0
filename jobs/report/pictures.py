"""The pictures of a job and of a sweep, which their pages show and MLflow keeps: what is drawn in them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from jobs.output.report import Report
from jobs.report import charts
from jobs.report.comparison import BITS, ComparedJob, words_of
from jobs.report.metrics import LAYER, error_by_layer
from jobs.report.tables import size

# The spread in bits per weight from which on the picture of a mix is drawn. Scales and padding of small matrices alone
# make a smaller one.
MIXED = 0.75


def pictures(report: Report) -> dict[str, str]:
    """Draw a job: sizes by role, errors by layer, and a mix's bits, as far as there is something to draw; as SVG."""
    found = {"size": size_by_role(report)}
    errors = {layer: error.relative_error for layer, error in error_by_layer(report).items()}
    if errors and all(map(math.isfinite, errors.values())):
        found["error_by_layer"] = charts.line(errors, "layer", "relative error")
    if (mix := mix_by_layer(report)) is not None:
        found["mix"] = mix
    return found


def size_by_role(report: Report) -> str:
    """Draw the bytes of each role of tensors, before and after, the largest first."""
    roles: dict[str, tuple[int, int]] = {}
    for tensor in report.tensors:
        before, after = roles.get(tensor.role, (0, 0))
        roles[tensor.role] = (before + tensor.source_bytes, after + tensor.output_bytes)
    rows = sorted(((role, *both) for role, both in roles.items()), key=lambda row: -row[1])
    return charts.bars(rows, ("before", "after"), size)


def mix_by_layer(report: Report) -> str | None:
    """Draw the bits per weight of every matrix, by layer and module; None if all are about the same."""
    bits: dict[tuple[int, str], list[float]] = {}
    for tensor in report.tensors:
        match = LAYER.search(tensor.name)
        if match and len(tensor.shape) > 1:
            # Experts of a layer share a cell, which shows their mean.
            module = re.sub(r"\.\d+\.", ".*.", tensor.name[match.end() :].removesuffix(".weight"))
            bits.setdefault((int(match[1]), module), []).append(tensor.output_bytes * 8 / max(1, tensor.sums.numel))
    means = {place: sum(found) / len(found) for place, found in bits.items()}
    if not means or max(means.values()) - min(means.values()) < MIXED:
        return None
    return charts.grid(means, "bits per weight")


def size_and_error(jobs: Sequence[ComparedJob], front: Sequence[str], error: str) -> str | None:
    """Draw error against size of jobs, with the line of those that no other beats in both; None without any."""
    drawn = [job for job in jobs if job.is_comparable and math.isfinite(job.metrics.get(error, math.nan))]
    if not drawn:
        return None
    points = [charts.Point(job.name, job.metrics[BITS], job.metrics[error], _interval(job, error)) for job in drawn]
    return charts.scatter(points, front, "bits per weight", words_of(error))


def _interval(job: ComparedJob, error: str) -> tuple[float, float] | None:
    low, high = (job.metrics.get(f"{error}_{end}") for end in ("low", "high"))
    return None if low is None or high is None else (low, high)
