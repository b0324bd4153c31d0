"""Units: where the recipes of a checkpoint are cut into pieces of work. From the source and its family alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from loaders.recipes import Recipe


def cut_units(recipes: Sequence[Recipe], unit_bytes: float) -> list[list[Recipe]]:
    """Runs of whole blocks of at most `unit_bytes` of source, or one block.

    Recipes come sorted by block, or in the order of a GGUF, whose tensors need no partners.
    """
    units: list[list[Recipe]] = []
    size = 0
    for _, run in groupby(recipes, key=lambda recipe: recipe.block):
        block = list(run)
        block_bytes = sum(recipe.source_bytes for recipe in block)
        if not units or size + block_bytes > unit_bytes:
            units.append([])
            size = 0
        units[-1].extend(block)
        size += block_bytes
    return units
