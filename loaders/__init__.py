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
        MissingFile,
        Problem,
        StorageError,
        TransientIOError,
        VerifyFailed,
        WeightmillError,
    )
    from loaders.loading.cache import WeightCache
    from loaders.loading.checkpoint_loader import CheckpointLoader
    from loaders.loading.checks import (
        compute_weight_hash,
        compute_weight_hash_rust,
        filter_shared_tensors,
        validate_weight_shapes,
        validate_weight_shapes_rust,
    )
    from loaders.loading.config import LoadConfig, WeightLoaderConfig, create_aggressive_config
    from loaders.loading.load import clear_cache, load_and_quantize, load_weights
    from loaders.loading.quantize import quantize
    from loaders.loading.quantized_tensor import QuantizedTensor, QuantizedWeights
    from loaders.loading.recommend import Recommendation, get_recommended_loader_config
    from loaders.loading.resources import Shared, configure
    from loaders.loading.save import save
    from loaders.loading.statistics import Statistics
    from loaders.missing import MissingLibrary
    from loaders.models.adapters import save_adapter, trained_weights
    from loaders.models.config import Backend, LoadingStrategy, ModelLoadingConfig
    from loaders.models.fsdp import load_sharded_model
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
    from loaders.strategies.iterators import (
        fastsafetensors_weights_iterator,
        gguf_quant_weights_iterator,
        multi_thread_pt_weights_iterator,
        multi_thread_safetensors_weights_iterator,
        pt_weights_iterator,
        runai_safetensors_weights_iterator,
        safetensors_weights_iterator,
    )

__all__ = [
    "AtomicWriter",
    "AutoLoader",
    "Backend",
    "BadCheckpoint",
    "BadSpec",
    "Checkpoint",
    "CheckpointLoader",
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
    "MissingFile",
    "MissingLibrary",
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
    "QuantizedWeights",
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
    "WeightLoaderConfig",
    "WeightSpec",
    "WeightmillError",
    "atomic_writer",
    "clear_cache",
    "compute_weight_hash",
    "compute_weight_hash_rust",
    "configure",
    "create_aggressive_config",
    "detect_weight_format",
    "fastsafetensors_weights_iterator",
    "file_lock",
    "filter_shared_tensors",
    "get_file_lock_path",
    "get_recommended_loader_config",
    "gguf_quant_weights_iterator",
    "load_and_quantize",
    "load_model_and_tokenizer",
    "load_sharded_model",
    "load_weights",
    "loader",
    "multi_thread_pt_weights_iterator",
    "multi_thread_safetensors_weights_iterator",
    "open_checkpoint",
    "preset",
    "preset_names",
    "pt_weights_iterator",
    "quantize",
    "runai_safetensors_weights_iterator",
    "safetensors_weights_iterator",
    "save",
    "save_adapter",
    "trained_weights",
    "validate_weight_shapes",
    "validate_weight_shapes_rust",
]

_PLACES = {
    "checkpoints.checkpoint": ("Checkpoint", "open_checkpoint"),
    "checkpoints.detect": ("WeightFormat", "detect_weight_format"),
    "errors": (
        "BadCheckpoint", "BadSpec", "MissingFile", "Problem", "StorageError", "TransientIOError", "VerifyFailed",
        "WeightmillError",
    ),
    "loading.cache": ("WeightCache",),
    "loading.checks": (
        "compute_weight_hash", "compute_weight_hash_rust", "filter_shared_tensors", "validate_weight_shapes",
        "validate_weight_shapes_rust",
    ),
    "loading.checkpoint_loader": ("CheckpointLoader",),
    "loading.config": ("LoadConfig", "WeightLoaderConfig", "create_aggressive_config"),
    "loading.load": ("clear_cache", "load_and_quantize", "load_weights"),
    "loading.quantize": ("quantize",),
    "loading.quantized_tensor": ("QuantizedTensor", "QuantizedWeights"),
    "loading.recommend": ("Recommendation", "get_recommended_loader_config"),
    "loading.resources": ("Shared", "configure"),
    "loading.save": ("save",),
    "loading.statistics": ("Statistics",),
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
        "load_sharded_model",
        "save_adapter",
        "trained_weights",
    ),
    "missing": ("MissingLibrary",),
    "presets.catalog": ("preset", "preset_names"),
    "progress": ("Progress",),
    "specs": ("WeightSpec",),
    "stats": ("CompressionStats", "ErrorSums", "LayerStats", "LoadStats"),
    "storage.atomic": ("AtomicWriter", "atomic_writer", "file_lock", "get_file_lock_path"),
    "strategies.iterators": (
        "fastsafetensors_weights_iterator", "gguf_quant_weights_iterator", "multi_thread_pt_weights_iterator",
        "multi_thread_safetensors_weights_iterator", "pt_weights_iterator", "runai_safetensors_weights_iterator",
        "safetensors_weights_iterator",
    ),
}  # fmt: skip
_PLACE_OF = {name: module for module, names in _PLACES.items() for name in names}


if not TYPE_CHECKING:  # a checker would believe any name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'loaders' has no attribute {name!r}")
        return getattr(importlib.import_module(f"loaders.{_PLACE_OF.get(name, 'strategies')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
