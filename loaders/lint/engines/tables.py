"""Which checkpoints the tables here know whole, so that their engine need not be asked about an output of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from loaders.architectures.families import Family
from loaders.lint.engines.base import patterns

NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
LAYER = re.compile(r"(?P<layer>(?:^|.*?\.)layers?\.\d+)\.(?P<rest>.+)")


def unfamiliar(family: Family, names: Sequence[str]) -> str | None:
    """Return what of a model is in no table here that a test holds against the engines; None if all of it is.

    A table names tensors, and does not count them: that a layer lacks some, its fellows tell.
    """
    if family.is_generic:
        return "not known here"
    # Few patterns stand for many names, which differ in numbers alone.
    unnamed = {pattern for pattern in {NUMBERS.sub("0", name) for name in names} if not family.has_row(pattern)}
    if unnamed:
        others = [name for name in names if NUMBERS.sub("0", name) in unnamed]
        return f"no table here names {patterns(others)}"
    return _lacking(names)


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _lacking(names: Iterable[str]) -> str | None:
    """Return which layer lacks tensors that another one has, which has all of its own, too; None if none does."""
    layers: dict[str, set[str]] = {}
    for name in names:
        if match := LAYER.match(name):
            layers.setdefault(match["layer"], set()).add(match["rest"])
    first: dict[tuple[str, frozenset[str]], str] = {}
    for layer, rest in layers.items():
        first.setdefault((layer.rpartition(".")[0], frozenset(rest)), layer)
    for (stem, found), layer in first.items():
        for (other_stem, more), other in first.items():
            # A layer without any expert, beside some with experts, is a dense one.
            is_dense = not any(map(_is_expert, found)) and any(map(_is_expert, more))
            if stem == other_stem and found < more and not is_dense:
                return f"{layer} lacks {patterns(sorted(more - found))} of {other}"
    return None
