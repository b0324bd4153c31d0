"""Strict validation of plain values by a pydantic model, with all faults at once and the place of each."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from jobs.cli.choices import choice_values, with_kind
from jobs.cli.instead import instead
from jobs.cli.meant import OPTIONS, key_hint
from loaders.errors import BadSpec
from loaders.faults import by_place, expectations, kinds_of, models_of, named
from loaders.near_misses import WITHOUT, meant, plain
from loaders.places import DEMO
from loaders.presets.base import PathValue
from loaders.storage import KINDS, kind_of
from loaders.storage.address import IN_MLFLOW, Address
from loaders.storage.hub.names import hub_name

MISSING = "???"  # Hydra's mark of a value that the user must give
MOVED = {"source.unit_mb": "unit_mb"}  # keys of earlier versions
ELSEWHERE = {  # keys of another verb
    f"cluster.{name}": "it is for plan, which says how long such machines take; a job takes those of the Ray cluster"
    " at cluster.address"
    for name in ("nodes", "node")
}
S = TypeVar("S", bound=BaseModel)


def check(
    spec: type[S], values: dict[str, Any], problems: Sequence[str] = (), tell: Callable[[str], None] = lambda _: None
) -> S:
    """Validate plain values; paths become absolute, and names of the Hub's repositories URLs, which `tell` hears of.

    Raises:
        BadSpec: all faults, those in `problems` first.
    """
    found = [*problems, *_missing(spec, values), *_make_absolute(spec, values, tell)]
    try:
        # Strict models take a list for a tuple from JSON only.
        made = spec.model_validate_json(json.dumps(values))
    except ValidationError as error:
        faults = [fault for fault in error.errors() if fault["input"] != MISSING]
        found += [_problem(spec, values, place, mine) for place, mine in by_place(spec, faults)]
    if found:
        raise BadSpec(found)
    return made


def _missing(spec: type[BaseModel], values: Any, name: str = "") -> list[str]:
    """List the required values that were not given."""
    if isinstance(values, dict):
        return [
            problem for key, value in values.items() for problem in _missing(spec, value, f"{name}.{key}".lstrip("."))
        ]
    if values != MISSING:
        return []
    field = spec.model_fields.get(name)
    what = f" ({field.description})" if field is not None and field.description else ""
    return [f"{name}: missing{what}; give {name}=..."]


def _make_absolute(spec: type[BaseModel], values: Any, tell: Callable[[str], None], place: str = "") -> list[str]:
    """Make the paths among the values absolute, by their fields' types; returns problems with URLs."""
    if not isinstance(values, dict):
        return []
    problems = []
    for name, field in _all_fields(spec, values):
        value, path = values.get(name), f"{place}{name}"
        for model in at_field(field.annotation):
            problems += _make_absolute(model, value, tell, f"{path}.")
        kind = next((each for each in _markers(field) if isinstance(each, PathValue)), None)
        if kind is None or not isinstance(value, str) or value in (MISSING, *kind.words):
            continue
        if not value:
            problems.append(f"{path}: expected a path, found an empty one")
            continue
        try:
            named = hub_name(value) if kind.is_read else None
            address = Address.of(value)
        except BadSpec as error:
            problems.append(f"{path}: {error}")
            continue
        if named is not None:
            tell(f"{path}: {value} is no folder here: it is read from the Hub, as {named}")
            values[name] = named.text
        elif value == "demo://":
            values[name] = str(DEMO)
        elif not address.is_local:
            if kind.is_read and address.scheme in IN_MLFLOW:
                continue
            try:
                kind_of(address)
            except BadSpec as error:
                problems.append(f"{path}: {error}")
            if not kind.stores and address.scheme in KINDS:
                problems.append(f"{path}: expected a path of this machine; found {address}")
        else:
            values[name] = os.path.abspath(address.path.expanduser())
    return problems


def path_keys(spec: type[BaseModel]) -> set[str]:
    """Return the dotted names of a request's settings whose values are paths, such as "output.path"."""
    return {
        place for place, field in fields_of(spec) if any(isinstance(marker, PathValue) for marker in _markers(field))
    }


def is_read(field: FieldInfo) -> bool:
    """Whether a setting's value is the address of something to read."""
    return any(isinstance(marker, PathValue) and marker.is_read for marker in _markers(field))


def fields_of(spec: type[BaseModel], place: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield all settings of a request by their dotted names, a group before what is in it."""
    for name, field in spec.model_fields.items():
        yield f"{place}{name}", field
        for model in at_field(field.annotation):
            yield from fields_of(model, f"{place}{name}.")


def _all_fields(spec: type[BaseModel], values: dict[str, Any]) -> Iterator[tuple[str, FieldInfo]]:
    """Return the fields of a model for which values are given."""
    return ((name, field) for name, field in spec.model_fields.items() if name in values)


def _markers(field: FieldInfo) -> Iterator[Any]:
    """Yield the annotations of a field's type, including those of the members of a union."""
    yield from field.metadata
    for inner in get_args(field.annotation):
        yield from getattr(inner, "__metadata__", ())


def _problem(spec: type[BaseModel], values: dict[str, Any], place: Sequence[Any], faults: Sequence[Any]) -> str:
    """Describe the faults of one place in a line: where, what is expected, what was found, what to type."""
    name, kind, found = named(place), faults[0]["type"], faults[0]["input"]
    if not place:  # a fault of the whole model
        return str(faults[0]["msg"].removeprefix("Value error, "))
    if kind == "extra_forbidden":
        return _unknown(spec, values, place, name)
    if kind == "missing":
        return f"{name}: missing"
    message = expectations(faults)
    if kind.startswith("union_tag"):
        wrong = found.get("kind") if isinstance(found, dict) else found
        return f"{name}.kind: {message}; {name}=NAME chooses one, with its settings; found {json.dumps(wrong)}"
    if isinstance(found, dict) and kind == "value_error":  # of several values together, which the message names itself
        return f"{name}{'.' if re.match(r'[a-z_]+: ', message) else ': '}{message}"
    return f"{name}: {message}{instead(name, kind, found, _is_optional(spec, place))}; found {_shown(found)}"


def _shown(found: Any) -> str:
    # JSON has no infinity, which is what a number such as 12e4567 becomes.
    return str(found) if isinstance(found, float) and not math.isfinite(found) else json.dumps(found, default=str)


def _unknown(spec: type[BaseModel], values: dict[str, Any], place: Sequence[Any], name: str) -> str:
    """Say that there is no such key: where it belongs, or what was meant."""
    leaf = str(place[-1])
    known = [key for key in _fields(spec, values, place[:-1]) if key != "kind"]
    if name in MOVED:
        return f"{name}: unknown key; it is {MOVED[name]} now"
    if name in ELSEWHERE:
        return f"{name}: unknown key; {ELSEWHERE[name]}"
    others = [m for m in _at(spec, place[:-1]) if leaf in m.model_fields]
    kinds = [kind for model in others for kind in kinds_of(model)]
    if kinds and len(place) == 2 and (belongs := with_kind(str(place[0]), kinds)):
        here = ", ".join(known) or "none"
        if place[0] == "quant":
            belongs = _settable(others, belongs, leaf)
        return f"{name}: unknown key; it belongs to {place[0]}={'|'.join(belongs)}; known: {here}"
    if len(place) > 1:
        why = WITHOUT.get(plain(leaf))
        near = meant(leaf, known)
        # A whole setting can be pasted; within a list there is no such word.
        whole = f"{name.removesuffix(leaf)}{near}" if all(isinstance(part, str) for part in place) else near
        hint = f"; {why}" if why else f"; did you mean {whole!r}?" if near else ""
    else:
        why = OPTIONS.get(plain(leaf)) or WITHOUT.get(plain(leaf))
        hint = f"; {why}" if why else key_hint(leaf, _taken(spec, values))
    return f"{name}: unknown key{hint}; known: {', '.join(known) or 'none'}"


def _settable(models: Sequence[type[BaseModel]], quants: list[str], leaf: str) -> list[str]:
    """Return the quants whose setting can be another than their own; many have a setting that is always the same."""
    values = {name: choice_values("quant", name) for name in quants}
    known = [each.get(leaf) for each in values.values()]
    found = [
        name
        for name, own in values.items()
        if any(value != own.get(leaf) and _takes(models, {**own, leaf: value}) for value in known)
    ]
    return found or quants


def _takes(models: Sequence[type[BaseModel]], values: dict[str, Any]) -> bool:
    """Whether one of some models takes a choice's values."""
    for model in models:
        with suppress(ValidationError):
            model.model_validate(values)
            return True
    return False


def _taken(spec: type[BaseModel], values: dict[str, Any]) -> list[str]:
    """Return the dotted names that can be typed, without a dtype of the quantization where the chosen one has none."""
    keys = [key for key, _ in fields_of(spec) if not key.startswith("rules.")]  # a list, which is given as a whole
    is_cast = "quant" not in values or "dtype" in _fields(spec, values, ("quant",))
    return [key for key in keys if is_cast or key != "quant.dtype"]


def _is_optional(spec: type[BaseModel], place: Sequence[Any]) -> bool:
    """Whether the value at a place may be null."""
    models, leaf = _at(spec, place[:-1]), place[-1]
    fields = [model.model_fields[leaf] for model in models if isinstance(leaf, str) and leaf in model.model_fields]
    return any(type(None) in get_args(field.annotation) for field in fields)


def at_field(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field's annotation allows; none for a plain value."""
    return list(models_of(annotation))


def _at(spec: type[BaseModel], location: Sequence[Any]) -> list[type[BaseModel]]:
    """Return the models that may be at a location in the tree of settings."""
    models = [spec]
    for part in location:
        if isinstance(part, str):
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            models = [found for f in fields for found in models_of(f.annotation)]
    return models


def _fields(spec: type[BaseModel], values: Any, location: Sequence[Any]) -> dict[str, None]:
    """Return the field names at a location; of several possible models, those of the one whose kind was chosen."""
    for part in location:
        values = values[part]
    kind = values.get("kind") if isinstance(values, dict) else None
    models = _at(spec, location)
    chosen = [model for model in models if kind in kinds_of(model)]
    return {name: None for model in chosen or models for name in model.model_fields}
