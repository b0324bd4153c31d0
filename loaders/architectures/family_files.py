"""Families as files: what one file of the folder `families` says of some model types, for each engine.

A file begins with `model_types: [...]` on one line, so that the file of a type is found without reading all of them.
Its sections are read by `loaders.architectures.mlx` and `loaders.architectures.gguf`, whose classes say what each
key means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast

from loaders.tables import parsed

FOLDER = Path(__file__).with_name("families")
MODEL_TYPES = re.compile(r"^model_types: \[([\w, .-]+)\]$", re.MULTILINE)


@cache
def _texts() -> Mapping[str, str]:
    """Return the text of each model type's file."""
    found: dict[str, str] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        types = MODEL_TYPES.search(text)
        assert types is not None, f"{path.name}: it must say `model_types: [...]` on one line"
        for model_type in types[1].split(", "):
            assert model_type not in found, f"{path.name}: another file has {model_type}, too"
            found[model_type] = text
    return found


@cache
def section(model_type: object, engine: str) -> Mapping[str, Any] | None:
    """Return what the family of a model type says for an engine; None if it says nothing, or there is no family.

    A section that says `like: MODEL_TYPE` has what that type's has, but for the keys that it has itself, and with what
    its `add` adds to them.
    """
    text = _texts().get(model_type) if isinstance(model_type, str) else None
    if text is None:
        return None
    found = parsed(text).get(engine)
    if found is None or "like" not in found:
        return cast("Mapping[str, Any] | None", found)
    own = {key: value for key, value in found.items() if key not in ("like", "add")}
    return added({**(section(found["like"], engine) or {}), **own}, found.get("add", {}))


def added(whole: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with changes: mappings and lists are added to its own, and what is neither takes its place."""
    made = dict(whole)
    for key, value in changes.items():
        before = made.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            made[key] = before | value
        else:
            made[key] = before + value if isinstance(value, list) and isinstance(before, list) else value
    return made


@cache
def known_types(engine: str) -> tuple[str, ...]:
    """Return the model types of which some file says something for an engine."""
    return tuple(model_type for model_type in sorted(_texts()) if section(model_type, engine) is not None)


def others_known(engine: str, config: Mapping[str, Any]) -> str:
    """Say what can be done with a model type that an engine's files do not have."""
    types = known_types(engine)
    close = get_close_matches(str(config.get("model_type"))[:64], types, 3)  # which may be any text
    nearest = f", {', '.join(close)} nearest" if close else ""
    return (
        f"{len(types)} model types are{nearest}; what transformers loads needs no such names: int8, nf4, hqq4, w4a16,"
        " fp8_dynamic"
    )
