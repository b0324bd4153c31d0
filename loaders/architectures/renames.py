"""transformers' renamings of published tensors: what a module is called inside its classes.

The data are its own (conversion_mapping.py), by `model_type`; `python -m tests.renames` takes them from the installed
version, and a test holds them against it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path

RENAMES_FILE = Path(__file__).with_name("renames.json")
Renames = tuple[tuple[re.Pattern[str], str], ...]


@functools.cache
def _rows() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = json.loads(RENAMES_FILE.read_text(encoding="utf-8"))["renames"]
    return found


@functools.cache
def renames_of(model_type: str) -> Renames:
    """Return the renamings of a model type, in the order in which transformers applies them."""
    return tuple((re.compile(pattern), new) for pattern, new in _rows().get(model_type, ()))


def inside(module: str, model_types: Iterable[str]) -> str:
    """Return a module's name inside transformers, but for what it puts before all names of a model."""
    name = f"{module}.weight"
    for model_type in model_types:
        for pattern, new in renames_of(model_type):
            name = pattern.sub(new, name)
    return name.removesuffix(".weight")
