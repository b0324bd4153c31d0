"""The figures of a job's report and of a comparison."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.output.report import Report
from jobs.report.comparison import BITS, ERROR, ComparedJob, Comparison, words_of
from jobs.report.metrics import LAYER, error_by_layer

NAMED = 20  # jobs that a figure distinguishes; of more, only those on the Pareto front, and the others are gray
# The spread in bits per weight from which on a figure of a mix is drawn. Scales and padding of small matrices alone
# make a smaller one.
MIXED = 0.75
MOST_LABELLED = 32  # layers up to which the figure of a mix has a number in each cell


def plots(report: Report, folder: Path) -> list[Path]:
    """Draw the error by layer, the size by role before and after, and the mix, as PNG files in a folder."""
    made = []
    title = report.job["quant"]["name"]
    layers = error_by_layer(report)
    if layers:
        figure, axes = _figure(3.5)
        errors = [error.relative_error for error in layers.values()]
        axes.plot(list(layers), errors, marker="o", markersize=3)
        axes.set(xlabel="layer", ylabel="relative error", title=f"{title}: error by layer")
        axes.set_ylim(0, 1.1 * max(errors) or None)
        _whole_numbers(axes)
        made.append(_saved(figure, folder / "error_by_layer.png"))
    roles: dict[str, tuple[float, float]] = {}
    for tensor in report.tensors:
        before, after = roles.get(tensor.role, (0.0, 0.0))
        roles[tensor.role] = (before + tensor.source_bytes / 1e6, after + tensor.output_bytes / 1e6)
    names = sorted(roles, key=lambda role: roles[role])
    figure, axes = _figure(1.5 + 0.5 * len(names))
    places = range(len(names))
    axes.barh([p + 0.2 for p in places], [roles[n][0] for n in names], 0.4, color="tab:gray", label="before")
    axes.barh([p - 0.2 for p in places], [roles[n][1] for n in names], 0.4, color="tab:blue", label="after")
    axes.set_yticks(list(places), names)
    axes.set(xlabel="MB", title=f"{title}: size by role")
    axes.legend(loc="lower right")
    made.append(_saved(figure, folder / "size.png"))
    if mix_plot(report, folder / "mix.png"):
        made.append(folder / "mix.png")
    return made


def mix_plot(report: Report, path: Path) -> bool:
    """Draw the bits per weight of every matrix, by layer and module, as a PNG; returns False if all are the same."""
    from matplotlib.figure import Figure

    bits: dict[tuple[int, str], list[float]] = {}
    for tensor in report.tensors:
        match = LAYER.search(tensor.name)
        if match and len(tensor.shape) > 1:
            # Experts of a layer share a cell, which shows their mean.
            module = re.sub(r"\.\d+\.", ".*.", tensor.name[match.end() :].removesuffix(".weight"))
            weights = max(1, tensor.sums.numel)
            bits.setdefault((int(match[1]), module), []).append(tensor.output_bytes * 8 / weights)
    means = {place: sum(found) / len(found) for place, found in bits.items()}
    if not means or max(means.values()) - min(means.values()) < MIXED:
        return False
    layers, modules = sorted({layer for layer, _ in means}), list(dict.fromkeys(module for _, module in means))
    grid = [[means.get((layer, module), math.nan) for layer in layers] for module in modules]
    figure = Figure(figsize=(2.5 + 0.35 * max(8, len(layers)), 1.5 + 0.35 * len(modules)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if not math.isnan(value) and len(layers) <= MOST_LABELLED:
                dark = value < (min(means.values()) + max(means.values())) / 2
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    axes.set_yticks(range(len(modules)), modules)
    step = -(-len(layers) // MOST_LABELLED)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(xlabel="layer", title=f"{report.job['quant']['name']}: bits a weight")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
    return True


def _figure(height: float) -> tuple[Any, Any]:
    """Return a figure, 8 inches wide, and its axes with fixed margins.

    matplotlib's automatic layouts draw a figure twice, which counts in a sweep of hundreds of jobs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height))
    axes = figure.add_axes((0.11, 0.55 / height, 0.87, 1 - 0.9 / height))
    return figure, axes


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _saved(figure: Any, path: Path) -> Path:
    # A low level of compression: in a sweep of hundreds of jobs, time counts more than the size of small files.
    figure.savefig(path, dpi=120, pil_kwargs={"compress_level": 1})
    return path


def comparison_plot(compared: Mapping[str, Comparison], path: Path) -> bool:
    """Draw, for each model, error against size with the Pareto front, and error by layer, as a PNG.

    Returns False if no job has a size and an error.
    """
    from matplotlib.figure import Figure

    drawn = {source: jobs for source, each in compared.items() if (jobs := _drawn(each))}
    if not drawn:
        return False
    figure = Figure(figsize=(13, 5.5 * len(drawn)), layout="constrained")
    parts = figure.subfigures(len(drawn), 1, squeeze=False)[:, 0]
    for part, (source, jobs) in zip(parts, drawn.items(), strict=True):
        if len(compared) > 1:
            part.suptitle(source, wrap=True)
        _one_model(part, jobs, compared[source])
    figure.savefig(path, dpi=120)
    return True


def _drawn(compared: Comparison) -> list[ComparedJob]:
    return [job for job in compared.jobs if job.is_comparable and compared.error in job.metrics]


def _one_model(figure: Any, drawn: Sequence[ComparedJob], compared: Comparison) -> None:
    front, error = compared.front, compared.error
    left, right = figure.subplots(1, 2)
    named = drawn if len(drawn) <= NAMED else [c for c in drawn if c.name in front]
    for each in (c for c in drawn if c not in named):
        left.scatter(each.metrics[BITS], each.metrics[error], color="lightgray", marker="o", s=12)
        right.plot(list(each.layers), list(each.layers.values()), color="lightgray", linewidth=0.7)
    bars = 0
    for index, each in enumerate(named):
        color, marker = f"C{index % 10}", "osv^D*P"[index // 10 % 7]
        spread = _interval(each, error)
        bars += spread is not None
        left.errorbar(
            each.metrics[BITS], each.metrics[error], yerr=spread, color=color, marker=marker, label=each.name,
            zorder=3, linestyle="", capsize=3,
        )  # fmt: skip
        if each.layers:
            right.plot(list(each.layers), list(each.layers.values()), color=color, marker=marker, markersize=3)
    best = sorted((c.metrics[BITS], c.metrics[error]) for c in drawn if c.name in front)
    left.plot([bits for bits, _ in best], [value for _, value in best], color="gray", linewidth=1)
    title = "the line: none is smaller and closer" + ("; bars: 95 % intervals" if bars else "")
    left.set(xlabel=words_of(BITS), ylabel=words_of(error), title=title)
    right.set(xlabel="layer", ylabel=words_of(ERROR), title="error by layer")
    _whole_numbers(right)
    for axes, values in (
        (left, [c.metrics[error] for c in drawn]),
        (right, [v for c in drawn for v in c.layers.values()]),
    ):
        if values and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
    figure.legend(loc="outside right upper", fontsize="small")


def _interval(job: ComparedJob, error: str) -> list[list[float]] | None:
    """Return how far a metric's 95 % interval reaches below and above it, as matplotlib takes it; None without one."""
    value, low, high = (job.metrics.get(f"{error}{end}") for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return None
    return [[max(0.0, value - low)], [max(0.0, high - value)]]
