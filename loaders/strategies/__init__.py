"""Strategies: how stored bytes get into memory. One loader per file; adding one is a file and a row here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from loaders.errors import BadSpec
from loaders.near_misses import near, unknown_setting
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.strategies.auto import AutoLoader
from loaders.strategies.base import PieceReader, Reader, TensorBytes, WeightLoader, WeightSlice, settings_of
from loaders.strategies.eager import EagerLoader, SafetensorsLoader
from loaders.strategies.fastsafetensors import FastSafetensorsLoader
from loaders.strategies.full import FullLoader
from loaders.strategies.lazy import LazyLoader
from loaders.strategies.low_memory import LowMemoryLoader
from loaders.strategies.multithread import MultiThreadWeightLoader
from loaders.strategies.pinned import PinnedLoader
from loaders.strategies.read import ReadLoader
from loaders.strategies.remote import RemoteLoader
from loaders.strategies.runai import RunaiLoader
from loaders.strategies.streaming import StreamingWeightLoader
from loaders.strategies.unified_memory import UnifiedMemoryLoader

LOADERS: dict[str, type[WeightLoader]] = {
    made.name: made
    for made in (
        LazyLoader, EagerLoader, ReadLoader, MultiThreadWeightLoader, StreamingWeightLoader, FastSafetensorsLoader,
        RunaiLoader, FullLoader, UnifiedMemoryLoader, PinnedLoader, LowMemoryLoader, RemoteLoader, AutoLoader,
    )
}  # fmt: skip

__all__ = [
    "LOADERS",
    "AutoLoader",
    "EagerLoader",
    "FastSafetensorsLoader",
    "FullLoader",
    "LazyLoader",
    "LowMemoryLoader",
    "MultiThreadWeightLoader",
    "PieceReader",
    "PinnedLoader",
    "ReadLoader",
    "Reader",
    "RemoteLoader",
    "RunaiLoader",
    "SafetensorsLoader",
    "StreamingWeightLoader",
    "TensorBytes",
    "UnifiedMemoryLoader",
    "WeightLoader",
    "WeightSlice",
    "loader",
    "settings_of",
]


def loader(strategy: str | WeightLoader, **settings: Any) -> WeightLoader:
    """Return a loader by its name in conf/strategy/, with the settings listed there; a loader is returned as it is.

    Raises:
        BadSpec: no such strategy, or it has no such setting.
    """
    if isinstance(strategy, WeightLoader):
        return strategy
    if strategy not in LOADERS:
        raise BadSpec(f"strategy: unknown {strategy!r}{near(str(strategy), LOADERS)}; known: {', '.join(LOADERS)}")
    made = LOADERS[strategy]
    known = settings_of(made)
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise BadSpec(f"strategy={strategy}: {unknown[0]}: {unknown_setting(unknown[0], known)}")
    return made(**settings)


def small_reader(files: PinnedFiles, specs: Sequence[WeightSpec]) -> AbstractContextManager[PieceReader]:
    """Open tensors of which a few bytes are read while a checkpoint is opened or checked, in any kind of store."""
    return LOADERS["read" if files.store.is_local else "remote"]().open(files, specs)
