"""transformers' renamings of published tensors: what a module is called inside its classes, and which it fuses or cuts.

The data are its own (conversion_mapping.py), by `model_type`; `python -m tests.renames` takes them from the installed
version, and a test holds them against it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RENAMES_FILE = Path(__file__).with_name("renames.json")
Renames = tuple[tuple[re.Pattern[str], str], ...]


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(RENAMES_FILE.read_text(encoding="utf-8"))
    return found


@functools.cache
def renames_of(model_type: str) -> Renames:
    """Return the renamings of a model type, in the order in which transformers applies them."""
    return tuple((re.compile(pattern), new) for pattern, new in _tables()["renames"].get(model_type, ()))


def inside(module: str, model_types: Iterable[str]) -> str:
    """Return a module's name inside transformers, but for what it puts before all names of a model."""
    name = f"{module}.weight"
    for model_type in model_types:
        for pattern, new in renames_of(model_type):
            name = pattern.sub(new, name)
    return name.removesuffix(".weight")


@functools.cache
def fused_of(model_type: str) -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
    """Return patterns for the weights of linear layers that a model type joins or cuts, and what it makes of each."""
    rows = _tables()["fused"].get(model_type, ())
    return tuple((re.compile(pattern), tuple(targets)) for pattern, targets in rows)


def fused_modules(weight: str, model_types: Iterable[str]) -> tuple[str, ...]:
    """Return the modules of transformers' class that a published weight becomes with others, or is cut into."""
    for model_type in model_types:
        for pattern, targets in fused_of(model_type):
            if pattern.search(weight):
                return tuple(pattern.sub(target, weight).removesuffix(".weight") for target in targets)
    return ()
