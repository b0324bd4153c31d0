"""Figures of a job's report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.metrics import error_by_layer


def plots(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Error by layer, and size before and after by role, as PNG files in a folder."""
    from matplotlib.figure import Figure

    made = []
    name = document["job"]["quant"]["name"]
    layers = error_by_layer(document)
    if layers:
        figure = Figure(figsize=(8, 3.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(list(layers), [error.relative_error for error in layers.values()], marker="o", markersize=3)
        axes.set(xlabel="layer", ylabel="relative error", title=f"{name}: error by layer", ylim=(0, None))
        made.append(folder / "error_by_layer.png")
        figure.savefig(made[-1], dpi=120)
    roles: dict[str, tuple[float, float]] = {}
    for tensor in document["tensors"]:
        before, after = roles.get(tensor["role"], (0.0, 0.0))
        roles[tensor["role"]] = (before + tensor["source_bytes"] / 1e6, after + tensor["output_bytes"] / 1e6)
    names = sorted(roles, key=lambda role: roles[role])
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(names))
    axes.barh([p + 0.2 for p in places], [roles[n][0] for n in names], 0.4, color="tab:gray", label="before")
    axes.barh([p - 0.2 for p in places], [roles[n][1] for n in names], 0.4, color="tab:blue", label="after")
    axes.set_yticks(list(places), names)
    axes.set(xlabel="MB", title=f"{name}: size by role")
    axes.legend()
    made.append(folder / "size.png")
    figure.savefig(made[-1], dpi=120)
    return made
