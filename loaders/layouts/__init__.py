"""What a consumer expects of an output: names, places, config.json, index. One file per consumer."""

from __future__ import annotations

from loaders.layouts.base import Assembling, Assembly, Layout, Naming, Placed
from loaders.layouts.gguf import GgufLayout
from loaders.layouts.hf import HfLayout

__all__ = ["BY_ENGINE", "LAYOUTS", "Assembling", "Assembly", "Layout", "Naming", "Placed"]

LAYOUTS: dict[str, Layout] = {"hf": HfLayout(), "gguf": GgufLayout()}
BY_ENGINE = {
    "plain": "hf",
    "bitsandbytes": "hf",
    "bitnet": "hf",
    "ggml": "gguf",
}  # the layout that a scheme's engine reads
