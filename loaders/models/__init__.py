"""Models of transformers and mlx-lm with weights loaded here: plain or quantized, whole, sharded, or streamed.

`evaluate` compares the predictions of a quantized checkpoint with those of its original. This package needs torch,
transformers 5 and accelerate (the extra `models`); quantized modules also need their engine. Checked with transformers
5.23, accelerate 1.15, bitsandbytes 0.50, hqq 0.2.8, mlx-lm 0.32.
"""

from __future__ import annotations

from typing import Any

from loaders.missing import needed_for
from loaders.models.config import LoadingStrategy, ModelLoadingConfig

__all__ = [
    "LoadingStrategy",
    "ModelLoadingConfig",
    "Quality",
    "evaluate",
    "load_model_and_tokenizer",
    "open_weights",
    "skeleton_of",
]


def __getattr__(name: str) -> Any:
    """Import torch and transformers when the first model is asked for.

    Raises:
        BadSpec: one of them is not installed.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed_for(f"loaders.models: {name}"):
        return _imported(name)


def _imported(name: str) -> Any:
    if name == "load_model_and_tokenizer":
        from loaders.models.loading import load_model_and_tokenizer

        return load_model_and_tokenizer
    if name in ("Quality", "evaluate"):
        from loaders.models import evaluating

        return getattr(evaluating, name)
    from loaders.models import skeleton

    return getattr(skeleton, name)
