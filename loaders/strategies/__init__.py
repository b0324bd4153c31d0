"""How stored bytes get into memory. One loader per file; adding one is a file and a row here."""

from __future__ import annotations

from loaders.errors import BadSpec
from loaders.strategies.base import Reader, WeightLoader
from loaders.strategies.lazy import LazyLoader
from loaders.strategies.read import ReadLoader

LOADERS: dict[str, type[WeightLoader]] = {"lazy": LazyLoader, "read": ReadLoader}

__all__ = ["LOADERS", "Reader", "WeightLoader", "loader"]


def loader(name: str) -> WeightLoader:
    """Look up a loader by the name used in conf/strategy/.

    Raises:
        BadSpec: no such strategy.
    """
    if name not in LOADERS:
        raise BadSpec(f"strategy: unknown {name!r}; known: {', '.join(LOADERS)}")
    return LOADERS[name]()
