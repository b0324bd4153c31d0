"""The figure of a comparison; and pictures where matplotlib, the extra `plots`, is not installed: none, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.cli.verb import note
from jobs.report.comparison import BITS, ERROR, ComparedJob, Comparison, words_of
from loaders.missing import absent, not_installed

NAMED = 20  # jobs that a figure distinguishes; of more, only those on the Pareto front, and the others are gray


def drawn(path: Path, draw: Callable[[Path], object]) -> Path | None:
    """Have a picture drawn at a path; None if there is nothing to draw, or no matplotlib, which is said in a line."""
    if lacks := absent("matplotlib"):
        note(str(not_installed(f"drawing {path.name}", lacks)))
        return None
    return None if draw(path) is False else path


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


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
