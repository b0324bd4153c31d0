"""Strict validation of plain values by a pydantic model, with all faults at once and the place of each."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from loaders.errors import BadSpec
from loaders.places import DEMO
from loaders.presets.base import PathValue
from loaders.storage import KINDS, kind_of
from loaders.storage.address import IN_MLFLOW, Address
from loaders.storage.hub.names import hub_name

MISSING = "???"  # Hydra's mark of a value that the user must give
# Names that settings have in other tools (bitsandbytes, transformers), for hints in messages.
SYNONYMS = {
    "blocksize": "group_size", "block_size": "group_size", "compress_statistics": "double_quant",
    "bnb_4bit_use_double_quant": "double_quant", "quant_storage": "storage_dtype", "model_path": "path",
    "torch_dtype": "dtype", "num_workers": "threads", "workers": "threads", "force": "overwrite",
}  # fmt: skip
MOVED = {"source.unit_mb": "unit_mb"}  # keys of earlier versions
S = TypeVar("S", bound=BaseModel)


def check(
    spec: type[S], values: dict[str, Any], problems: Sequence[str] = (), tell: Callable[[str], None] = lambda _: None
) -> S:
    """Validate plain values; paths become absolute, and names of the Hub's repositories URLs, which `tell` hears of.

    Raises:
        BadSpec: all faults, those in `problems` first.
    """
    found = [*problems, *_missing(values), *_make_absolute(spec, values, tell)]
    try:
        # Strict models take a list for a tuple from JSON only.
        made = spec.model_validate_json(json.dumps(values))
    except ValidationError as error:
        found += [_problem(spec, values, fault) for fault in error.errors() if fault["input"] != MISSING]
    if found:
        raise BadSpec(found)
    return made


def _missing(values: Any, name: str = "") -> list[str]:
    """List the required values that were not given."""
    if isinstance(values, dict):
        return [problem for key, value in values.items() for problem in _missing(value, f"{name}.{key}".lstrip("."))]
    return [f"{name}: missing; give {name}=..."] if values == MISSING else []


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


def _problem(spec: type[BaseModel], values: dict[str, Any], fault: Any) -> str:
    """Describe a fault of pydantic's in one line: where, what is expected, what was found."""
    location = _without_tags(spec, fault["loc"])
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    kind, found = fault["type"], fault["input"]
    if not location:  # a fault of the whole model
        return str(fault["msg"].removeprefix("Value error, "))
    if kind == "extra_forbidden":
        known = list(_fields(spec, values, location[:-1]))
        others = [m for m in _at(spec, location[:-1]) if location[-1] in m.model_fields]
        if location[0] == "verify" and others:
            belongs = [kind for other in others for kind in get_args(other.model_fields["kind"].annotation)]
            return f"{name}: it belongs to verify={' and verify='.join(belongs)}, which {_was(belongs)} not chosen"
        if name in MOVED:
            return f"{name}: unknown key; it is {MOVED[name]} now"
        meant = SYNONYMS.get(str(location[-1]))
        hint = f"; did you mean {meant!r}?" if meant in known else near(str(location[-1]), known)
        return f"{name}: unknown key{hint}; known: {', '.join(known) or 'none'}"
    if kind == "missing":
        return f"{name}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if isinstance(found, dict):  # a fault of several values together, which the message names itself
        return f"{name}{'.' if re.match(r'[a-z_]+: ', message) else ': '}{message}"
    return f"{name}: {message}; found {json.dumps(found, default=str)}"


def _was(some: Sequence[str]) -> str:
    return "was" if len(some) == 1 else "were"


def _without_tags(spec: type[BaseModel], location: Sequence[Any]) -> list[Any]:
    """Remove the tags of unions from a fault's location, which pydantic adds: ("quant", "bnb4", "group_size")."""
    kept: list[Any] = []
    for part in location:
        if not (kept and isinstance(part, str) and part in _tags(spec, kept)):
            kept.append(part)
    return kept


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation allows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _models(get_args(annotation)[0])
    elif origin in (Union, UnionType, tuple, list):
        for inner in get_args(annotation):
            yield from _models(inner)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def at_field(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a field's annotation allows; none for a plain value."""
    return list(_models(annotation))


def _at(spec: type[BaseModel], location: Sequence[Any]) -> list[type[BaseModel]]:
    """Return the models that may be at a location in the tree of settings."""
    models = [spec]
    for part in location:
        if isinstance(part, str):
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            models = [found for f in fields for found in _models(f.annotation)]
    return models


def _fields(spec: type[BaseModel], values: Any, location: Sequence[Any]) -> dict[str, None]:
    """Return the field names at a location; of several possible models, those of the one whose kind was chosen."""
    for part in location:
        values = values[part]
    kind = values.get("kind") if isinstance(values, dict) else None
    models = _at(spec, location)
    chosen = [m for m in models if "kind" in m.model_fields and kind in get_args(m.model_fields["kind"].annotation)]
    return {name: None for model in chosen or models for name in model.model_fields}


def _tags(spec: type[BaseModel], location: Sequence[Any]) -> set[Any]:
    models = _at(spec, location)
    if len(models) < 2:
        return set()
    return {tag for m in models for tag in get_args(m.model_fields["kind"].annotation)}


def near(name: str, known: Sequence[str] | dict[str, Any], phrase: str = "did you mean") -> str:
    """Return "; did you mean 'this'?" for the closest known name; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; {phrase} {close[0]!r}?" if close else ""
