"""Which checkpoints the tables here know whole, so that their engine need not be asked about an output of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from loaders.architectures.family import Family
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


def _lacking(names: Iterable[str]) -> str | None:
    """Return which layer lacks tensors that others have, which have all of its own, too; None if none does.

    What fewer layers have than lack it proves nothing: the last may be one for multi-token prediction.
    """
    layers: dict[str, set[str]] = {}
    for name in names:
        if match := LAYER.match(name):
            layers.setdefault(match["layer"], set()).add(match["rest"])
    alike: dict[tuple[str, frozenset[str]], list[str]] = {}
    for layer, rest in layers.items():
        alike.setdefault((layer.rpartition(".")[0], frozenset(rest)), []).append(layer)
    for (stem, found), lacking in alike.items():
        for (other_stem, more), having in alike.items():
            if stem == other_stem and found < more and len(having) >= len(lacking) and not _is_dense(found, more):
                return f"{lacking[0]} lacks {patterns(sorted(more - found))} of {having[0]}"
    return None


def _is_dense(found: Iterable[str], more: Iterable[str]) -> bool:
    """Whether a layer has no expert at all, beside one that has some."""
    return not any(".experts." in name for name in found) and any(".experts." in name for name in more)
