"""What a consumer expects of an output: names, places, config.json, index. One file per consumer."""

from __future__ import annotations

from loaders.layouts.base import Layout, Placed
from loaders.layouts.hf import HfLayout

__all__ = ["BY_ENGINE", "LAYOUTS", "Layout", "Placed"]

LAYOUTS: dict[str, Layout] = {"hf": HfLayout()}
BY_ENGINE = {
    "plain": "hf",
    "bitsandbytes": "hf",
    "bitnet": "hf",
    "compressed-tensors": "hf",
}  # the layout that a scheme's engine reads
