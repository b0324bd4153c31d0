"""How bytes sit in files: headers and offsets. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loaders.containers import pytorch, safetensors
from loaders.specs import WeightSpec

READERS: dict[str, Callable[[Path, str], tuple[WeightSpec, ...]]] = {
    "safetensors": safetensors.read_specs,
    "pytorch": pytorch.read_specs,
}
