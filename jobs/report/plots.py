"""The figure of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.report.comparison import BITS, ComparedJob

NAMED = 20  # jobs that a figure distinguishes; of more, only those on the Pareto front, and the others are gray


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def comparison_plot(candidates: Sequence[ComparedJob], front: Sequence[str], error: str, path: Path) -> bool:
    """Draw error against size with the Pareto front, and error by layer, as a PNG; returns False if no job has both."""
    from matplotlib.figure import Figure

    drawn = [c for c in candidates if c.is_comparable and error in c.metrics]
    if not drawn:
        return False
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    named = drawn if len(drawn) <= NAMED else [c for c in drawn if c.name in front]
    for each in (c for c in drawn if c not in named):
        left.scatter(each.metrics[BITS], each.metrics[error], color="lightgray", marker="o", s=12)
        right.plot(list(each.layers), list(each.layers.values()), color="lightgray", linewidth=0.7)
    for index, each in enumerate(named):
        color, marker = f"C{index % 10}", "osv^D*P"[index // 10 % 7]
        left.scatter(each.metrics[BITS], each.metrics[error], color=color, marker=marker, label=each.name, zorder=3)
        if each.layers:
            right.plot(list(each.layers), list(each.layers.values()), color=color, marker=marker, markersize=3)
    best = sorted((c.metrics[BITS], c.metrics[error]) for c in drawn if c.name in front)
    left.plot([bits for bits, _ in best], [value for _, value in best], color="gray", linewidth=1)
    left.set(xlabel="bits per weight", ylabel=error, title="the line: none is smaller and closer")
    right.set(xlabel="layer", ylabel="relative error", title="error by layer")
    _whole_numbers(right)
    for axes, values in (
        (left, [c.metrics[error] for c in drawn]),
        (right, [v for c in drawn for v in c.layers.values()]),
    ):
        if values and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    return True
