"""A picture of a mix: bits a weight, layers by modules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.metrics import LAYER

MIXED = 0.75  # bits: less is what scales and padding of small matrices make
MOST_LABELLED = 32  # layers whose numbers stand in the picture


def mix_plot(document: Mapping[str, Any], path: Path) -> bool:
    """Bits a weight of every quantized matrix, layers by modules, as a PNG; False if all have the same."""
    from matplotlib.figure import Figure

    bits: dict[tuple[int, str], list[float]] = {}
    for tensor in document["tensors"]:
        match = LAYER.search(tensor["name"])
        if match and len(tensor["shape"]) > 1:
            module = re.sub(r"\.\d+\.", ".*.", tensor["name"][match.end() :].removesuffix(".weight"))
            weights = max(1, tensor["sums"]["numel"])
            bits.setdefault((int(match[1]), module), []).append(tensor["output_bytes"] * 8 / weights)
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
    axes.set(xlabel="layer", title=f"{document['job']['quant']['name']}: bits a weight")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
    return True
