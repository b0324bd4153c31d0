"""Weights on some storage into memory, onto a device or into a model: `from loaders import load_weights`.

Names are imported when they are first used: importing this package alone takes no time, and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
    from loaders.checkpoints.detect import WeightFormat, detect_weight_format
    from loaders.errors import (
        BadCheckpoint,
        BadSpec,
        Problem,
        StorageError,
        TransientIOError,
        VerifyFailed,
        WeightmillError,
    )
    from loaders.loading.cache import WeightCache
    from loaders.loading.checks import compute_weight_hash, filter_shared_tensors, validate_weight_shapes
    from loaders.loading.config import LoadConfig
    from loaders.loading.load import Statistics, clear_cache, load_and_quantize, load_weights
    from loaders.loading.quantize import quantize
    from loaders.loading.quantized_tensor import QuantizedTensor
    from loaders.loading.recommend import Recommendation, get_recommended_loader_config
    from loaders.loading.resources import Shared, configure
    from loaders.loading.save import save
    from loaders.models.config import Backend, LoadingStrategy, ModelLoadingConfig
    from loaders.models.loading import load_model_and_tokenizer
    from loaders.models.model_loaders import ModelLoader, ModelLoaderFactory, QuantizedModelLoader, StandardModelLoader
    from loaders.models.quantization_config import QuantizationConfig, QuantizationMethod
    from loaders.presets.catalog import preset, preset_names
    from loaders.progress import Progress
    from loaders.specs import WeightSpec
    from loaders.stats import CompressionStats, ErrorSums, LayerStats, LoadStats
    from loaders.storage.atomic import AtomicWriter, atomic_writer, file_lock, get_file_lock_path
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
    "Backend",
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
    "LoadingStrategy",
    "LowMemoryLoader",
    "ModelLoader",
    "ModelLoaderFactory",
    "ModelLoadingConfig",
    "MultiThreadWeightLoader",
    "Problem",
    "Progress",
    "QuantizationConfig",
    "QuantizationMethod",
    "QuantizedModelLoader",
    "QuantizedTensor",
    "ReadLoader",
    "Recommendation",
    "RunaiLoader",
    "SafetensorsLoader",
    "Shared",
    "StandardModelLoader",
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
    "load_model_and_tokenizer",
    "load_weights",
    "loader",
    "open_checkpoint",
    "preset",
    "preset_names",
    "quantize",
    "save",
    "validate_weight_shapes",
]

_PLACES = {
    "checkpoints.checkpoint": ("Checkpoint", "open_checkpoint"),
    "checkpoints.detect": ("WeightFormat", "detect_weight_format"),
    "errors": (
        "BadCheckpoint",
        "BadSpec",
        "Problem",
        "StorageError",
        "TransientIOError",
        "VerifyFailed",
        "WeightmillError",
    ),
    "loading.cache": ("WeightCache",),
    "loading.checks": ("compute_weight_hash", "filter_shared_tensors", "validate_weight_shapes"),
    "loading.config": ("LoadConfig",),
    "loading.load": ("Statistics", "clear_cache", "load_and_quantize", "load_weights"),
    "loading.quantize": ("quantize",),
    "loading.quantized_tensor": ("QuantizedTensor",),
    "loading.recommend": ("Recommendation", "get_recommended_loader_config"),
    "loading.resources": ("Shared", "configure"),
    "loading.save": ("save",),
    "models": (
        "Backend",
        "LoadingStrategy",
        "ModelLoader",
        "ModelLoaderFactory",
        "ModelLoadingConfig",
        "QuantizationConfig",
        "QuantizationMethod",
        "QuantizedModelLoader",
        "StandardModelLoader",
        "load_model_and_tokenizer",
    ),
    "presets.catalog": ("preset", "preset_names"),
    "progress": ("Progress",),
    "specs": ("WeightSpec",),
    "stats": ("CompressionStats", "ErrorSums", "LayerStats", "LoadStats"),
    "storage.atomic": ("AtomicWriter", "atomic_writer", "file_lock", "get_file_lock_path"),
}
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}


if not TYPE_CHECKING:  # a checker would believe any name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'loaders' has no attribute {name!r}")
        return getattr(importlib.import_module(f"loaders.{_PLACE_OF.get(name, 'strategies')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
