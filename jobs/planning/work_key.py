"""The key of a unit's work: a digest of everything that determines its bytes, by values and not by identities.

Every field of every dataclass counts, so a field that is added later needs no word here. C code writes the text, since
`repr` of dataclasses took a quarter of the time of planning a large model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from operator import attrgetter
from typing import Any

from loaders.dtypes import DType
from loaders.storage.hashes import text_digest
from loaders.tensors.logical_tensor import LogicalTensor


def work_key(*work: Any) -> str:
    """Return a digest of texts, numbers, bytes, sequences, mappings, and dataclasses of such; their types count.

    Of a logical tensor inside a dataclass only the name counts: give it by itself for its fields (`fields_of`).
    """
    return text_digest(json.dumps(work, default=_plain, separators=(",", ":"), check_circular=False))


def fields_of(value: Any) -> Any:
    """Return the type's name and the fields of a dataclass."""
    return _by_fields(type(value))(value)  # type: ignore[arg-type]  # mypy takes type[Any] for unhashable


def _plain(value: Any) -> Any:
    return _way(type(value))(value)  # type: ignore[arg-type]


@cache
def _way(kind: Any) -> Callable[[Any], Any]:
    """Return the function that makes values of a type plain; it is chosen once for each type."""
    assert isinstance(kind, type)
    if issubclass(kind, DType | LogicalTensor):  # a table names each dtype, and a unit's tensors are told beside
        return attrgetter("name")
    if issubclass(kind, bytes):
        return bytes.hex
    return dict if issubclass(kind, Mapping) else _fields_getter(kind)


@cache
def _by_fields(kind: Any) -> Callable[[Any], Any]:
    assert isinstance(kind, type)
    return _fields_getter(kind)


def _fields_getter(kind: type) -> Callable[[Any], Any]:
    names, label = [field.name for field in fields(kind)], kind.__qualname__
    if not names:
        return lambda value: [label]
    get = attrgetter(*names)
    return lambda value: [label, get(value)]
