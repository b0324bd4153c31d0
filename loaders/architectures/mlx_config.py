"""config.json as mlx-lm reads it, and what it could not be told of a model. Facts from mlx_lm 0.32 (models/*.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loaders.architectures.mlx import MlxModel

NEEDS_TYPE = ("phi3", "qwen2_moe")  # whose rope_scaling must have the older key
VISION = "vision_config"


def text_of(model: MlxModel, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's settings."""
    nested = config.get("text_config")
    return nested if model.is_nested and isinstance(nested, Mapping) else config


def num_experts(model: MlxModel, config: Mapping[str, Any]) -> int | None:
    """How many experts a layer has, by whichever name the config has it."""
    text = text_of(model, config)
    found = next((text[k] for k in (model.num_experts, "num_experts", "num_local_experts") if k in text), None)
    return found if model.experts is not None and isinstance(found, int) else None


def fault(model: MlxModel, config: Mapping[str, Any]) -> str | None:
    """What mlx-lm could not be told of a config, or None."""
    text, model_type = text_of(model, config), config["model_type"]
    head_dim, usual = text.get("head_dim"), _usual_head_dim(text)
    if not model.has_head_dim and head_dim not in (None, usual):
        return (
            f"config.json: head_dim is {head_dim}, but mlx-lm's {model_type} takes hidden_size /"
            f" num_attention_heads, {usual}: it could not load these weights; use another engine's quant"
        )
    if model.experts is not None and num_experts(model, config) is None:
        return f"config.json: expected {model.num_experts}, which {model_type} needs, found none"
    if model_type == "deepseek_v2" and _rope(text)[1] is None:
        return "config.json: mlx-lm's deepseek_v2 fails without a rope scaling, which this model has not"
    if model_type == "qwen2_moe" and (text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1):
        return "config.json: mlx-lm's qwen2_moe has experts in every layer; this model has not (mlp_only_layers)"
    said = _layers_fault(str(model_type), text)
    return None if said is None else f"config.json: mlx-lm's {model_type} {said}; it would compute something else"


def _layers_fault(model_type: str, text: Mapping[str, Any]) -> str | None:
    """Layers of a kind that mlx-lm works out from their numbers, and not as the config says."""
    layers = int(text.get("num_hidden_layers", 0))
    if model_type.startswith("gemma3") and isinstance(text.get("layer_types"), list):
        pattern = sliding_pattern(text)
        wanted = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
        if text["layer_types"] != wanted:
            return f"attends fully in every layer whose number {pattern} divides, not as layer_types says"
    if model_type == "llama4":
        ropes, step = text.get("no_rope_layers"), int(text.get("interleave_moe_layer_step", 1))
        if ropes and [bool(r) for r in ropes] != [(i + 1) % 4 != 0 for i in range(layers)]:
            return "leaves out rope in every fourth layer, not as no_rope_layers says"
        if text.get("moe_layers", range(step - 1, layers, step)) and list(
            text.get("moe_layers", range(step - 1, layers, step))
        ) != list(range(step - 1, layers, step)):
            return f"has experts in every layer whose number {step} divides, not as moe_layers says"
    return None


def head_fault(model: MlxModel, model_type: str, *, has_head: bool) -> str | None:
    """Whether the output projection is where mlx-lm's class expects it."""
    if model.head == "own" and not has_head:
        return f"mlx-lm's {model_type} has an output projection of its own: it cannot load a tied one; untie it first"
    if model.head == "tied" and has_head:
        return f"mlx-lm's {model_type} has no output projection of its own: drop it by a rule if it is the embedding"
    return None


def sliding_pattern(text: Mapping[str, Any]) -> int:
    """Gemma 3: every so manieth layer attends to all."""
    return int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 6)


def _usual_head_dim(text: Mapping[str, Any]) -> int | None:
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _rope(text: Mapping[str, Any]) -> tuple[Any, Any]:
    """rope_theta and rope_scaling, from the older places or from rope_parameters; None where there is none."""
    rope = text.get("rope_parameters")
    theta, scaling = text.get("rope_theta"), text.get("rope_scaling")
    if isinstance(rope, Mapping) and isinstance(rope.get("full_attention"), Mapping):
        rope = rope["full_attention"]
    if isinstance(rope, Mapping):
        theta = rope.get("rope_theta") if theta is None else theta
        if scaling is None and rope.get("rope_type", rope.get("type", "default")) != "default":
            scaling = dict(rope)
    return theta, scaling


def translate_config(model: MlxModel, config: Mapping[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """config.json as mlx-lm reads it; transformers reads it too.

    transformers 5 keeps rope_theta and the scaling in rope_parameters and calls num_experts num_local_experts: mlx-lm
    reads the older places, and without them takes its own defaults without a word. An absent tie_word_embeddings means
    true to mlx-lm and false to transformers: it is always written.
    """
    made = {key: value for key, value in config.items() if key not in ("_name_or_path", VISION)}
    made["tie_word_embeddings"] = is_tied
    if not model.is_nested:
        return made | _translated(model, config)
    text = text_of(model, config)
    made["text_config"] = dict(text) | _translated(model, text, str(config.get("model_type")))
    if "vocab_size" not in made and "vocab_size" in text:
        made["vocab_size"] = text["vocab_size"]
    return made


def _translated(model: MlxModel, text: Mapping[str, Any], model_type: str | None = None) -> dict[str, Any]:
    """The language model's settings that must stand elsewhere, or be said."""
    made: dict[str, Any] = {}
    model_type = model_type or str(text.get("model_type"))
    theta, scaling = _rope(text)
    if theta is not None:
        made["rope_theta"] = theta
    if scaling is not None or model_type == "llama4":
        made["rope_scaling"] = scaling
    if scaling is not None and model_type in NEEDS_TYPE and "type" not in scaling:
        made["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    rope = text.get("rope_parameters")
    if isinstance(rope, Mapping) and model_type == "phi3" and "partial_rotary_factor" in rope:
        made["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if model_type.startswith("gemma3"):
        made["sliding_window_pattern"] = sliding_pattern(text)
        local = rope.get("sliding_attention") if isinstance(rope, Mapping) else None
        if isinstance(local, Mapping) and "rope_theta" in local:
            made["rope_local_base_freq"] = local["rope_theta"]
    if text.get("num_key_value_heads") is None and "num_attention_heads" in text:
        made["num_key_value_heads"] = text["num_attention_heads"]
    if text.get("head_dim") is None and _usual_head_dim(text) is not None:
        made["head_dim"] = _usual_head_dim(text)
    if model.experts is not None:
        made[model.num_experts] = num_experts(model, {**text, "text_config": text})
    return made | {key: value for key, value in model.needs.items() if text.get(key) is None}


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The block of settings; None where config.json has none of MLX's."""
    for key in ("quantization", "quantization_config"):
        block = config.get(key)
        if isinstance(block, Mapping) and "group_size" in block and "bits" in block and "quant_method" not in block:
            return block
    return None
