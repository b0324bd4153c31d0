"""Weights on some storage into memory, onto a device or into a model: `from loaders import load_weights`.

Names are imported when they are first used: importing this package alone takes no time, and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.atomic import AtomicWriter, atomic_writer, file_lock, get_file_lock_path
    from loaders.cache import WeightCache
    from loaders.checking import compute_weight_hash, filter_shared_tensors, validate_weight_shapes
    from loaders.checkpoint import Checkpoint, open_checkpoint
    from loaders.encoded import QuantizedTensor
    from loaders.errors import BadCheckpoint, BadSpec, StorageError, TransientIOError, VerifyFailed, WeightmillError
    from loaders.formats import WeightFormat, detect_weight_format
    from loaders.load_config import LoadConfig
    from loaders.loading import Statistics, clear_cache, load_and_quantize, load_weights
    from loaders.presets import preset, preset_names
    from loaders.recommending import Recommendation, get_recommended_loader_config
    from loaders.shared import Shared, configure
    from loaders.specs import WeightSpec
    from loaders.stats import CompressionStats, ErrorSums, LayerStats, LoadStats
    from loaders.strategies import (
        AutoLoader,
        EagerLoader,
        FastSafetensorsLoader,
        FullLoader,
        LazyLoader,
        LowMemoryLoader,
        MultiThreadWeightLoader,
        ReadLoader,
        RunaiLoader,
        SafetensorsLoader,
        StreamingWeightLoader,
        UnifiedMemoryLoader,
        WeightLoader,
        loader,
    )

__all__ = [
    "AtomicWriter",
    "AutoLoader",
    "BadCheckpoint",
    "BadSpec",
    "Checkpoint",
    "CompressionStats",
    "EagerLoader",
    "ErrorSums",
    "FastSafetensorsLoader",
    "FullLoader",
    "LayerStats",
    "LazyLoader",
    "LoadConfig",
    "LoadStats",
    "LowMemoryLoader",
    "MultiThreadWeightLoader",
    "QuantizedTensor",
    "ReadLoader",
    "Recommendation",
    "RunaiLoader",
    "SafetensorsLoader",
    "Shared",
    "Statistics",
    "StorageError",
    "StreamingWeightLoader",
    "TransientIOError",
    "UnifiedMemoryLoader",
    "VerifyFailed",
    "WeightCache",
    "WeightFormat",
    "WeightLoader",
    "WeightSpec",
    "WeightmillError",
    "atomic_writer",
    "clear_cache",
    "compute_weight_hash",
    "configure",
    "detect_weight_format",
    "file_lock",
    "filter_shared_tensors",
    "get_file_lock_path",
    "get_recommended_loader_config",
    "load_and_quantize",
    "load_weights",
    "loader",
    "open_checkpoint",
    "preset",
    "preset_names",
    "validate_weight_shapes",
]

_PLACES = {
    "atomic": ("AtomicWriter", "atomic_writer", "file_lock", "get_file_lock_path"),
    "cache": ("WeightCache",),
    "checking": ("compute_weight_hash", "filter_shared_tensors", "validate_weight_shapes"),
    "checkpoint": ("Checkpoint", "open_checkpoint"),
    "encoded": ("QuantizedTensor",),
    "errors": ("BadCheckpoint", "BadSpec", "StorageError", "TransientIOError", "VerifyFailed", "WeightmillError"),
    "formats": ("WeightFormat", "detect_weight_format"),
    "load_config": ("LoadConfig",),
    "loading": ("Statistics", "clear_cache", "load_and_quantize", "load_weights"),
    "presets": ("preset", "preset_names"),
    "recommending": ("Recommendation", "get_recommended_loader_config"),
    "shared": ("Shared", "configure"),
    "specs": ("WeightSpec",),
    "stats": ("CompressionStats", "ErrorSums", "LayerStats", "LoadStats"),
}
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'loaders' has no attribute {name!r}")
    return getattr(importlib.import_module(f"loaders.{_PLACE_OF.get(name, 'strategies')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
