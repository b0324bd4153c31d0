"""Layouts: what a consumer expects of an output, in names, places, config.json and index. One file per consumer."""

from __future__ import annotations

from loaders.layouts.base import Assembling, Assembly, Forming, Layout, Naming, Placed
from loaders.layouts.diffusers import DiffusersLayout
from loaders.layouts.engines import ENGINES
from loaders.layouts.gguf.layout import GgufLayout
from loaders.layouts.hf import HfLayout
from loaders.layouts.hqq import HqqLayout
from loaders.layouts.mlx import MlxLayout
from loaders.layouts.packed import PackedLayout

__all__ = [
    "BY_ENGINE",
    "ENGINES",
    "LAYOUTS",
    "WHOLE_STACKS",
    "Assembling",
    "Assembly",
    "Forming",
    "Layout",
    "Naming",
    "Placed",
]

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (HfLayout(), HqqLayout(), MlxLayout(), GgufLayout(), PackedLayout(), DiffusersLayout())
}
BY_ENGINE = {name: engine.layout for name, engine in ENGINES.items()}  # the layout that a scheme's engine reads
WHOLE_STACKS = tuple(name for name, engine in ENGINES.items() if engine.whole_stacks)
