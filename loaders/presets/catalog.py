"""The presets of conf/quant by name, for callers of the library, which has neither jobs nor Hydra."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from loaders.errors import BadSpec
from loaders.faults import expectations, named, place_of
from loaders.near_misses import unknown_quant, unknown_setting
from loaders.places import CONF
from loaders.presets.auto import QuantSpec
from loaders.presets.settings import Quant

FOLDER = CONF / "quant"
DEFAULT = "nf4"
ADAPTER: TypeAdapter[Quant] = TypeAdapter(QuantSpec)


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets but `auto`, whose mix only a job can measure."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "auto"))


def preset(name: str, **settings: Any) -> Quant:
    """Return a preset, with some of its settings changed (`group_size=128`).

    Raises:
        BadSpec: no such preset, no such setting, or a wrong value; all faults at once.
    """
    if name not in preset_names():
        raise BadSpec(f"quantize: {_unknown(name)}")
    try:
        return ADAPTER.validate_python({**_values(name), **settings})
    except ValidationError as error:
        raise BadSpec([_problem(name, fault) for fault in error.errors()]) from None


def _unknown(name: object) -> str:
    if name == "auto":
        return "'auto' is a mix, which only a job (weightmill run) can measure"
    return unknown_quant(name, preset_names())


def _problem(name: str, fault: Any) -> str:
    """Say one fault of pydantic's in terms of the preset."""
    place = place_of(QuantSpec, fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = [key for key in type(preset(name)).model_fields if key not in ("kind", "name")]
        return f"quantize: {name}: {place[-1]}: {unknown_setting(str(place[-1]), known)}"
    found = "" if isinstance(fault["input"], dict) else f"; found {fault['input']!r:.80}"
    return f"quantize: {named(place)}{': ' if place else ''}{expectations([fault])}{found}"


def preset_values(name: str) -> dict[str, Any] | None:
    """Return the values of the preset of a name, `auto` included; None if it is none of weightmill's."""
    return dict(_values(name)) if (FOLDER / f"{name}.yaml").is_file() else None


@cache
def _values(name: str) -> dict[str, Any]:
    """Read a preset's file over those that its `defaults` name, as Hydra 1.3 composes them.

    Hydra itself would be a dependency of the library for this alone.
    """
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    base: dict[str, Any] = {}
    for other in values.pop("defaults", []):
        if other != "_self_":
            base |= _values(other)
    return {**base, **values}
