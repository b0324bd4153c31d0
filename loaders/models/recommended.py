"""A recommendation (`get_recommended_loader_config`) as the settings of loading a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec
from loaders.loading.recommend import Recommendation, planned_bytes
from loaders.models.config import NAMES, LoadingStrategy, ModelLoadingConfig
from loaders.models.hub_cache import place_of_model
from loaders.presets.catalog import preset
from loaders.words import listed

MB = 1_000_000
# By backend, what modules of transformers and mlx-lm hold, from most bits per weight to fewest.
SCHEMES = {
    "cuda": ("int8", "nf4", "hqq3", "hqq2"),
    "cpu": ("int8", "nf4", "hqq3", "hqq2"),
    "mps": ("hqq8", "hqq4", "hqq3", "hqq2"),
    "mlx": ("mlx_int8", "mlx_int4"),
}


def config_of(
    given: ModelLoadingConfig | Recommendation | None, name: str | Path | None, settings: Mapping[str, Any]
) -> ModelLoadingConfig:
    """Return the settings of a load, from a config or a recommendation, a model's name and what replaces settings.

    Raises:
        BadSpec: `given` is neither, it is of another model, the name is no name, or a setting is wrong.
    """
    if isinstance(name, ModelLoadingConfig | Recommendation):
        kind = type(name).__name__
        raise BadSpec(
            f"name_or_path: expected a folder, a URL or a name of the Hub, found a {kind}; give it as config="
        )
    if not isinstance(name, str | os.PathLike | None):
        raise BadSpec(f"name_or_path: expected a folder, a URL or a name of the Hub, found {name!r:.80}")
    if given is not None and not isinstance(given, ModelLoadingConfig | Recommendation):
        raise BadSpec(f"config: expected a ModelLoadingConfig, found {given!r:.80}; settings go in as arguments")
    if isinstance(given, Recommendation):
        given = _recommended(given, name, settings)
    config = ModelLoadingConfig(**settings) if given is None else given.with_settings(**settings)
    if name is None or config.model_name == name:
        return config
    if config.model_name is not None and str(config.model_name) != str(name):
        raise BadSpec(f"name_or_path: {name} was given, and in config model_name={config.model_name}; give one")
    return config.with_settings(model_name=name)


def _recommended(advice: Recommendation, name: str | Path | None, settings: Mapping[str, Any]) -> ModelLoadingConfig:
    """Return the settings for the most bits per weight that a model's modules can hold within the advised memory.

    Presets of other engines (GGUF, compressed-tensors) are no modules that are made while loading. Where nothing fits,
    a module at a time does, but for MLX.

    Raises:
        BadSpec: nothing fits.
    """
    name, own = advice.model_name if name is None else name, {NAMES.get(each, each) for each in settings}
    config = ModelLoadingConfig(name, advice.backend)
    if name is None or "quantization_config" in own:
        return config
    room = advice.available_bytes - advice.reserve_bytes
    checkpoint = open_checkpoint(place_of_model(name), key="name_or_path")
    said = []
    for scheme in ("none", *(SCHEMES[advice.backend] if checkpoint.quantized_by is None else ())):
        try:
            size, _ = planned_bytes(checkpoint, preset(scheme))
        # The preset cannot take this checkpoint; another one may.
        except (BadSpec, BadCheckpoint):
            continue
        if size <= room:
            return config if scheme == "none" else config.with_settings(quantize=scheme)
        said.append(f"{scheme} takes {size / MB:.1f} MB")
    if advice.backend == "mlx" or room <= 0:
        raise BadSpec(f"nothing fits into {room / MB:.1f} MB for weights: {listed(said, '', '').strip()}")
    return config.with_settings(strategy=LoadingStrategy.STREAMING, memory_budget_mb=room / MB)
