"""mlx-lm's own conversion of a tiny checkpoint, which ours is held against: what mlx_lm.convert does, without a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.engines import mlx_lm_or_skip

GROUP = 32
# What a type's published config.json says, and the tiny one does not, which transformers' class has saved.
GIVEN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4},
}
FLOATS = ("float16", "bfloat16", "float32")


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with rotary embeddings where checkpoints of transformers 4 have them, which mlx-lm reads."""
    made = {key: published(part) if key == "text_config" else part for key, part in config.items()}
    if isinstance(text := config.get("text_config"), Mapping) and "vocab_size" in text:
        made.setdefault("vocab_size", text["vocab_size"])
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return made
    if isinstance(local := rope.get("sliding_attention"), Mapping) and str(config.get("model_type")).startswith("gemma3"):
        made["rope_local_base_freq"] = local.get("rope_theta")
    if isinstance(rope.get("full_attention"), Mapping):
        if not str(config.get("model_type")).startswith("gemma3"):
            return made
        rope = rope["full_attention"]
    made.setdefault("rope_theta", rope.get("rope_theta"))
    if rope.get("rope_type", "default") != "default":
        made.setdefault("rope_scaling", dict(rope))
    else:
        made.setdefault("rope_scaling", None)
    if rope.get("partial_rotary_factor") is not None:
        made.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    return made


def theirs(source: Path, out: Path, config: Mapping[str, Any], *, quantize: bool = True) -> Any:
    """Convert a checkpoint by mlx-lm's functions; returns its model. `config` adds to config.json."""
    utils = mlx_lm_or_skip()
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    model, config = utils.load_model(source, lazy=True, model_config=dict(config))
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if name in FLOATS:
        chosen = getattr(model, "cast_predicate", lambda _: True)
        model.update(
            tree_map_with_path(
                lambda key, value: (
                    value.astype(getattr(mx, name)) if chosen(key) and mx.issubdtype(value.dtype, mx.floating) else value
                ),
                model.parameters(),
            )
        )
    if quantize:
        model, config = utils.quantize_model(model, config, GROUP, 4)
    utils.save_model(out, model)
    utils.save_config(config, out / "config.json")
    return model


def logits(model: Any) -> np.ndarray:
    import mlx.core as mx

    ids = np.random.default_rng(1).integers(3, 300, (1, 9))
    return np.array(model(mx.array(ids)).astype(mx.float32))
