"""What a consumer expects of an output: names, places, config.json, index. One file per consumer."""

from __future__ import annotations

from loaders.layouts.base import Layout, Placed
from loaders.layouts.hf import HfLayout
from loaders.layouts.mlx import MlxLayout

__all__ = ["BY_ENGINE", "LAYOUTS", "Layout", "Placed"]

LAYOUTS: dict[str, Layout] = {"hf": HfLayout(), "mlx": MlxLayout()}
BY_ENGINE = {
    "plain": "hf",
    "bitsandbytes": "hf",
    "bitnet": "hf",
    "mlx": "mlx",
}  # the layout that a scheme's engine reads
