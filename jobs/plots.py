"""Figures of a job's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.comparison import BITS, Candidate
from jobs.metrics import error_by_layer
from jobs.mix_plot import mix_plot


def plots(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Error by layer, and size before and after by role, as PNG files in a folder."""
    made = []
    title = document["job"]["quant"]["name"]
    layers = error_by_layer(document)
    if layers:
        figure, axes = _figure(3.5)
        errors = [error.relative_error for error in layers.values()]
        axes.plot(list(layers), errors, marker="o", markersize=3)
        axes.set(xlabel="layer", ylabel="relative error", title=f"{title}: error by layer")
        axes.set_ylim(0, 1.1 * max(errors) or None)
        _whole_numbers(axes)
        made.append(_saved(figure, folder / "error_by_layer.png"))
    roles: dict[str, tuple[float, float]] = {}
    for tensor in document["tensors"]:
        before, after = roles.get(tensor["role"], (0.0, 0.0))
        roles[tensor["role"]] = (before + tensor["source_bytes"] / 1e6, after + tensor["output_bytes"] / 1e6)
    names = sorted(roles, key=lambda role: roles[role])
    figure, axes = _figure(1.5 + 0.5 * len(names))
    places = range(len(names))
    axes.barh([p + 0.2 for p in places], [roles[n][0] for n in names], 0.4, color="tab:gray", label="before")
    axes.barh([p - 0.2 for p in places], [roles[n][1] for n in names], 0.4, color="tab:blue", label="after")
    axes.set_yticks(list(places), names)
    axes.set(xlabel="MB", title=f"{title}: size by role")
    axes.legend(loc="lower right")
    made.append(_saved(figure, folder / "size.png"))
    if mix_plot(document, folder / "mix.png"):
        made.append(folder / "mix.png")
    return made


def _figure(height: float) -> tuple[Any, Any]:
    """A figure 8 inches wide and its axes, at set margins: to find them by drawing twice takes twice the time, which
    counts where a sweep has hundreds of jobs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height))
    axes = figure.add_axes((0.11, 0.55 / height, 0.87, 1 - 0.9 / height))
    return figure, axes


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120, pil_kwargs={"compress_level": 1})
    return path


def comparison_plot(candidates: Sequence[Candidate], front: Sequence[str], error: str, path: Path) -> bool:
    """Error against size with the front, and error by layer of all, in one PNG; False if there is nothing to draw."""
    from matplotlib.figure import Figure

    drawn = [c for c in candidates if c.is_comparable and error in c.metrics]
    if not drawn:
        return False
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, each in enumerate(drawn):
        color, marker = f"C{index % 10}", "osv^D*P"[index // 10 % 7]
        left.scatter(each.metrics[BITS], each.metrics[error], color=color, marker=marker, label=each.name, zorder=3)
        if each.layers:
            right.plot(list(each.layers), list(each.layers.values()), color=color, marker=marker, markersize=3)
    best = sorted((c.metrics[BITS], c.metrics[error]) for c in drawn if c.name in front)
    left.plot([bits for bits, _ in best], [value for _, value in best], color="gray", linewidth=1)
    left.set(xlabel="bits a weight", ylabel=error, title="the line: none is smaller and closer")
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
