"""The faults that pydantic finds in settings, in the words of who typed them: where, what is expected, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from loaders.near_misses import near

NUMBERS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "names with values, as in {a: 1}",
    "model": "settings, as in {a: 1}",
    "none": "null",
}
LISTED = re.compile(r"(?:expected one of|known:) (.+)$")  # the names that our own checks list
CHOICE = re.compile(r"'([^']*)'|(-?\d+)")


def expected(fault: Any) -> str:
    """Say what one fault of pydantic's expected: "expected a whole number"."""
    kind, context = str(fault["type"]), fault.get("ctx") or {}
    if kind in NUMBERS:
        word, key = NUMBERS[kind]
        limit = context[key]
        return f"expected {word} {limit:g}" if isinstance(limit, float) else f"expected {word} {limit}"
    if kind == "literal_error":
        known = [word or number for word, number in CHOICE.findall(str(context["expected"]))]
        found = fault["input"]
        return f"expected {_one_of(known)}{near(found, known) if isinstance(found, str) else ''}"
    if kind == "string_pattern_mismatch":
        return "expected letters, digits, '.', '_' and '-' only"
    if kind in ("string_too_short", "too_short"):
        return "expected something, found nothing"
    if kind == "union_tag_invalid":
        known = CHOICE.findall(str(context["expected_tags"]))
        return f"expected a kind of {_one_of([word for word, _ in known])}"
    if kind == "union_tag_not_found":
        return "it has no kind, which says what the settings are of"
    if kind == "int_from_float":
        return "expected a whole number"
    word = kind.rsplit("_", 1)[0].removesuffix("_attributes")
    if word in KINDS:
        return f"expected {KINDS[word]}"
    message = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    found, listed = fault["input"], LISTED.search(message)
    is_text = kind == "value_error" and isinstance(found, str) and listed is not None and ";" not in listed[1]
    hint = near(found, listed[1].split(", ")) if is_text and listed is not None else ""
    return message[:1].lower() + message[1:] + hint


def _one_of(known: Sequence[str]) -> str:
    return f"{', '.join(known[:-1])} or {known[-1]}" if len(known) > 1 else "".join(known)


def by_place(spec: Any, faults: Sequence[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield places in a tree of settings, without pydantic's own words for types, and the faults of each."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for fault in faults:
        found.setdefault(tuple(place_of(spec, fault["loc"])), []).append(fault)
    for place, mine in found.items():
        # Of the members of a union, the one that fits best says most.
        if not any(len(other) > len(place) and other[: len(place)] == place for other in found):
            yield list(place), mine


def place_of(spec: Any, location: Sequence[Any]) -> list[Any]:
    """Return a fault's place as the names of settings: ("quant", "bnb4", "group_size") is quant.group_size.

    Pydantic adds the tag or the type of each member of a union, and of mappings' keys.
    """
    kept: list[Any] = []
    types = [spec]
    for part in location:
        if isinstance(part, int):
            kept.append(part)
            continue
        models = [model for each in types for model in models_of(each)]
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        tagged = [model for model in models if len(models) > 1 and part in kinds_of(model)]
        if fields:
            kept.append(part)
            types = [field.annotation for field in fields]
        elif tagged:
            types = list(tagged)
        elif models:
            kept.append(part)  # a setting that is not known
            types = []
        elif not models and any(_is_mapping(each) for each in types) and part != "[key]":
            kept.append(part)
            types = []
    return kept


def kinds_of(model: type[BaseModel]) -> tuple[Any, ...]:
    """Return the values of `kind` by which a model is chosen among others."""
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _is_mapping(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin in (Annotated, Union, UnionType):
        return any(_is_mapping(inner) for inner in get_args(annotation))
    return annotation is dict or origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping))


def models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation allows."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from models_of(get_args(annotation)[0])
    elif origin in (Union, UnionType, tuple, list):
        for inner in get_args(annotation):
            yield from models_of(inner)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def named(place: Sequence[Any]) -> str:
    """Write a place as a setting's dotted name: rules[0].quant."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def expectations(faults: Sequence[Any]) -> str:
    """Say what all faults of one place expected; each member of a union has one."""
    said = list(dict.fromkeys(expected(fault) for fault in faults))
    first, *others = [each for each in said if each != "expected null"] or said
    return ", or ".join([first, *(each.removeprefix("expected ") for each in others)])


def sentences(spec: Any, faults: Sequence[Any]) -> list[str]:
    """Say all faults of settings given in Python, one line for each place."""
    said = []
    for place, mine in by_place(spec, faults):
        found = mine[0]["input"]
        where = named(place)
        is_whole = not isinstance(found, Mapping | BaseModel)  # else the message names the values itself
        said.append(f"{where}{': ' if where else ''}{expectations(mine)}{f'; found {found!r:.80}' if is_whole else ''}")
    return said


def not_positive(name: str, value: object, *, whole: bool = False, least: float | None = None) -> str | None:
    """Say what is wrong with an argument that is to be a number above zero, or of at least `least`; None if nothing."""
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return f"{name}: expected {kind}, found {value!r}"
    if value <= 0 or (least is not None and value < least):
        return f"{name}: expected {'more than 0' if least is None else f'at least {least}'}, found {value}"
    return None
