"""Models of transformers and mlx-lm with weights loaded here: plain or quantized, whole, sharded, or streamed.

`evaluate` compares the predictions of a quantized checkpoint with those of its original. This package needs torch,
transformers 5 and accelerate (the extra `models`); quantized modules also need their engine. Checked with transformers
5.23, accelerate 1.15, bitsandbytes 0.50, hqq 0.2.8, mlx-lm 0.32.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loaders.missing import needed_for
from loaders.models.config import Backend, LoadingStrategy, ModelLoadingConfig
from loaders.models.quantization_config import QuantizationConfig, QuantizationMethod

if TYPE_CHECKING:
    from loaders.models.adapters import save_adapter, trained_weights
    from loaders.models.evaluating import evaluate
    from loaders.models.fsdp import load_sharded_model
    from loaders.models.loading import load_model_and_tokenizer
    from loaders.models.model_loaders import ModelLoader, ModelLoaderFactory, QuantizedModelLoader, StandardModelLoader
    from loaders.models.quality import Quality
    from loaders.models.skeleton import open_weights, skeleton_of

__all__ = [
    "Backend",
    "LoadingStrategy",
    "ModelLoader",
    "ModelLoaderFactory",
    "ModelLoadingConfig",
    "Quality",
    "QuantizationConfig",
    "QuantizationMethod",
    "QuantizedModelLoader",
    "StandardModelLoader",
    "evaluate",
    "load_model_and_tokenizer",
    "load_sharded_model",
    "open_weights",
    "save_adapter",
    "skeleton_of",
    "trained_weights",
]
PLACES = {
    "adapters": ("save_adapter", "trained_weights"),
    "evaluating": ("Quality", "evaluate"),
    "fsdp": ("load_sharded_model",),
    "loading": ("load_model_and_tokenizer",),
    "model_loaders": ("ModelLoader", "ModelLoaderFactory", "QuantizedModelLoader", "StandardModelLoader"),
    "skeleton": ("open_weights", "skeleton_of"),
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers when the first model is asked for.

    Raises:
        BadSpec: one of them is not installed.
    """
    place = next((module for module, names in PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed_for(f"loaders.models: {name}"):
        return getattr(import_module(f"{__name__}.{place}"), name)
