"""The key of a unit's work: a digest of everything that determines its bytes, by values and not by identities.

Every field of every dataclass counts, so a field that is added later needs no word here. C code writes the text, since
`repr` of dataclasses took a quarter of the time of planning a large model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any

from loaders.dtypes import DType
from loaders.storage.hashes import digest_of
from loaders.tensors.logical_tensor import LogicalTensor


def work_key(*work: Any, levels: int = 0) -> str:
    """Return a digest of texts, numbers, bytes, sequences, mappings, and dataclasses of such; their types count.

    Of a logical tensor inside a dataclass only the name counts: give it by itself for its fields (`fields_of`).
    The entries of so many `levels` of sequences become text one by one: that is slower, and the whole text, which may
    be larger than the plan, is never in memory. The digest is the same.
    """
    return digest_of(_texts(work, levels))


def _texts(value: Any, levels: int) -> Iterator[str]:
    if is_dataclass(value) and levels:
        value = _plain(value)
    if not levels or not isinstance(value, list | tuple):
        yield json.dumps(value, default=_plain, separators=(",", ":"), check_circular=False)
        return
    yield "["
    for index, each in enumerate(value):
        yield from [","] if index else []
        yield from _texts(each, levels - 1)
    yield "]"


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
