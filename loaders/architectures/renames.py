"""What transformers makes of published tensors, by `model_type`.

What a module is called inside its classes, and which modules it fuses, cuts, ties to others or keeps in float32. The
data are its own (conversion_mapping.py and the attributes of its classes); `python -m tests.renames` takes them from
the installed version, and a test holds them against it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loaders.tables import table

RENAMES_FILE = Path(__file__).with_name("renames.json")
Renames = tuple[tuple[re.Pattern[str], str], ...]


def _tables() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = table(RENAMES_FILE)
    return found


@functools.cache
def renames_of(model_type: str) -> Renames:
    """Return the renamings of a model type, in the order in which transformers applies them."""
    return tuple((re.compile(pattern), new) for pattern, new in _tables()["renames"].get(model_type, ()))


def inside(module: str, model_types: Iterable[str]) -> str:
    """Return a module's name inside transformers, but for what it puts before all names of a model."""
    return tensor_inside(f"{module}.weight", model_types).removesuffix(".weight")


def insides(module: str, model_types: Iterable[str]) -> tuple[str, ...]:
    """Return the names that a module may have inside: the renamings of one part of a model are not those of another."""
    whole, *parts = (*model_types,) or ("",)
    found = (inside(module, (whole, *parts)), *(inside(module, (whole, part)) for part in parts))
    return tuple(dict.fromkeys(found))


def tensor_inside(name: str, model_types: Iterable[str]) -> str:
    """Return a tensor's name inside transformers, but for what it puts before all names of a model."""
    for model_type in model_types:
        for pattern, new in renames_of(model_type):
            name = pattern.sub(new, name)
    return name


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


# What wraps the text model, in any order; engines put these components in front of names, and take them away.
WRAPPERS = re.compile(r"^(?:(?:model|language_model|transformer|backbone|text_model|llm)\.)+")


def tied_heads(model_types: Iterable[str]) -> tuple[str, ...]:
    """Return the modules beside `lm_head` that model types may tie to tables, so that they are not stored."""
    return _tied(model_types, 1)


def tied_layers(model_types: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that model types may tie to linear layers, so that they are not stored."""
    return _tied(model_types, 2)


def _tied(model_types: Iterable[str], length: int) -> tuple[str, ...]:
    rows = (row for model_type in model_types for row in _tables()["tied"].get(model_type, ()))
    return tuple(dict.fromkeys(row[0] for row in rows if len(row) == length))


def float32_of(model_types: Iterable[str]) -> tuple[str, ...]:
    """Return patterns for the modules that model types keep in float32: see `_bound_of`."""
    found = (pattern for model_type in model_types for pattern in _tables()["float32"].get(model_type, ()))
    return tuple(dict.fromkeys(found))


@functools.cache
def _bound_of(model_type: str) -> tuple[re.Pattern[str], ...]:
    """Return patterns for linear layers that a model type ties to others, on either side, or keeps in float32."""
    tied = (WRAPPERS.sub("", name) for row in _tables()["tied"].get(model_type, ()) if len(row) == 2 for name in row)
    # transformers compares these with the beginning of a name, up to the end of a component, or with its end.
    floats = (rf"^(?:{pattern})(?:\.|$)|{pattern}$" for pattern in float32_of((model_type,)))
    patterns = (*(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in dict.fromkeys(tied)), *floats)
    return tuple(re.compile(pattern) for pattern in patterns)


def is_bound(module: str, model_types: Iterable[str]) -> bool:
    """Whether a linear layer may not be quantized: another layer shares its weight, or it is kept in float32."""
    types = tuple(model_types)
    name = inside(module, types)
    return any(pattern.search(name) for model_type in types for pattern in _bound_of(model_type))
