"""config.json as mlx-lm reads it, and the models that need a setting for which mlx-lm has no key.

Facts are from mlx_lm 0.32, models/*.py: each model's ModelArgs, and how its layers use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loaders.architectures.mlx import MlxModel
from loaders.architectures.mlx_rope import ignored_factors, rope_fault, scaling_for_mlx
from loaders.architectures.windows import ignored_window

NEEDS_TYPE = ("phi3", "qwen2_moe")  # models whose rope_scaling must have "type", the older name of "rope_type"
VISION = "vision_config"


def text_of(model: MlxModel, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the language model, which a multimodal config holds one level down."""
    nested = config.get("text_config")
    return nested if model.nested and isinstance(nested, Mapping) else config


def num_experts(model: MlxModel, config: Mapping[str, Any]) -> int | None:
    """Return the number of experts in a layer, by whichever name the config has; None for a dense model."""
    text = text_of(model, config)
    if model.experts is None:
        return None
    found = next((text[k] for k in (model.experts.count, "num_experts", "num_local_experts") if k in text), None)
    return found if isinstance(found, int) else None


def fault(model: MlxModel, config: Mapping[str, Any]) -> str | None:
    """Describe a setting that mlx-lm would read wrongly or could not load; None if there is none."""
    text, model_type = text_of(model, config), config["model_type"]
    head_dim, usual = text.get("head_dim"), _usual_head_dim(text)
    if not model.head_dim and head_dim not in (None, usual):
        return (
            f"config.json: head_dim is {head_dim}, but mlx-lm's {model_type} takes hidden_size /"
            f" num_attention_heads, {usual}: it could not load these weights; use another engine's quant"
        )
    if model_type == "deepseek_v2" and _rope(text)[1] is None:
        return "config.json: mlx-lm's deepseek_v2 fails without a rope scaling, which this model lacks"
    if model_type == "qwen2_moe" and (text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1):
        return "config.json: mlx-lm's qwen2_moe has experts in every layer; this model does not (mlp_only_layers)"
    said = _computed_fault(model, text) or rope_fault(model, text)
    return None if said is None else f"config.json: mlx-lm's {model_type} {said}; it would compute something else"


def not_computed(model: MlxModel, config: Mapping[str, Any]) -> list[str]:
    """Warn of what config.json says and mlx-lm does not compute, or not for every text."""
    text, model_type = text_of(model, config), str(config["model_type"])
    return [*ignored_window(config, "mlx-lm"), *ignored_factors(model, model_type, text)]


def _computed_fault(model: MlxModel, text: Mapping[str, Any]) -> str | None:
    """Say which setting mlx-lm does not read would have it compute something else, or return None."""
    for key, known in model.takes.items():
        if text.get(key) is not None and text[key] not in known:
            return f"knows {key} {' or '.join(map(repr, known))}, and config.json has {text[key]!r}"
    return next((said for place in model.places if (said := place.fault(text))), None)


def head_fault(model: MlxModel, model_type: str, *, has_head: bool) -> str | None:
    """Say why the output projection is not where mlx-lm's class expects it, or return None."""
    if model.head == "own" and not has_head:
        return f"mlx-lm's {model_type} has an output projection of its own: it cannot load a tied one; untie it first"
    if model.head == "tied" and has_head:
        return f"mlx-lm's {model_type} has no output projection of its own: drop it by a rule if it is the embedding"
    return None


def _usual_head_dim(text: Mapping[str, Any]) -> int | None:
    """Return hidden_size / num_attention_heads, which is a head's size where the config says nothing."""
    hidden, heads = text.get("hidden_size"), text.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _rope(text: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return rope_theta and rope_scaling from the older places or from rope_parameters; None where there is none."""
    rope = text.get("rope_parameters")
    theta, scaling = text.get("rope_theta"), text.get("rope_scaling")
    # Gemma 3 has parameters for each kind of layer; mlx-lm's rope_theta is that of layers with full attention.
    if isinstance(rope, Mapping) and isinstance(rope.get("full_attention"), Mapping):
        rope = rope["full_attention"]
    if isinstance(rope, Mapping):
        theta = rope.get("rope_theta") if theta is None else theta
        if scaling is None and rope.get("rope_type", rope.get("type", "default")) != "default":
            scaling = dict(rope)
    return theta, scaling


def translate_config(model: MlxModel, config: Mapping[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """Return a config.json that mlx-lm reads, and transformers as well.

    transformers 5 keeps rope_theta and the scaling in rope_parameters, and calls num_experts num_local_experts. mlx-lm
    reads the older places, and where they are missing takes its own defaults silently. An absent tie_word_embeddings
    means true to mlx-lm and false to transformers, so it is always written.
    """
    made = {key: value for key, value in config.items() if key not in ("_name_or_path", VISION)}
    made["tie_word_embeddings"] = is_tied
    text = text_of(model, config)
    if text is config:
        return made | _translated(model, config)
    made["text_config"] = dict(text) | _translated(model, text, str(config.get("model_type")))
    made["text_config"]["tie_word_embeddings"] = is_tied
    if "vocab_size" not in made and "vocab_size" in text:
        made["vocab_size"] = text["vocab_size"]
    return made


def _translated(model: MlxModel, text: Mapping[str, Any], model_type: str | None = None) -> dict[str, Any]:
    """Return the language model's settings that mlx-lm looks for in other places, or that it needs stated."""
    made: dict[str, Any] = {}
    model_type = model_type or str(text.get("model_type"))
    theta, scaling = (None, None) if model.own_rope else _rope(text)
    if theta is not None:
        made["rope_theta"] = theta
    if isinstance(scaling, Mapping):
        scaling = scaling_for_mlx(model, scaling, text)
    if scaling is not None or model_type == "llama4":
        made["rope_scaling"] = scaling
    if scaling is not None and model_type in NEEDS_TYPE and "type" not in scaling:
        made["rope_scaling"] = {**scaling, "type": scaling.get("rope_type", "default")}
    rope = text.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("partial_rotary_factor") is not None:
        made["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if isinstance(rope, Mapping) and model_type == "phi3" and "original_max_position_embeddings" in rope:
        made.setdefault("original_max_position_embeddings", rope["original_max_position_embeddings"])
    if model_type.startswith("gemma3"):
        local = rope.get("sliding_attention") if isinstance(rope, Mapping) else None
        if isinstance(local, Mapping) and "rope_theta" in local:
            made["rope_local_base_freq"] = local["rope_theta"]
    if {"num_key_value_heads", "num_attention_groups"}.isdisjoint(k for k, v in text.items() if v is not None) and (
        "num_attention_heads" in text
    ):
        made["num_key_value_heads"] = text["num_attention_heads"]
    if text.get("head_dim") is None and _usual_head_dim(text) is not None:
        made["head_dim"] = _usual_head_dim(text)
    if model.experts is not None and num_experts(model, {**text, "text_config": text}) is not None:
        made[model.experts.count] = num_experts(model, {**text, "text_config": text})
    made |= _global_heads(text)
    for place in model.places:
        made |= place.setting(text)
    for key, words in model.words.items():
        if isinstance(text.get(key), list):
            made[key] = [words.get(entry, entry) if isinstance(entry, str) else entry for entry in text[key]]
    return {key: value for key, value in model.defaults.items() if text.get(key) is None} | made


def _global_heads(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of Gemma 4's layers with full attention, which transformers 5.23 keeps layer by layer."""
    layers = text.get("per_layer_config")
    found = next(iter(layers.values()), None) if isinstance(layers, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    words = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return {own: found[key] for key, own in words.items() if key in found and text.get(own) is None}


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return MLX's block of settings in config.json, or None if there is none."""
    for key in ("quantization", "quantization_config"):
        block = config.get(key)
        if isinstance(block, Mapping) and "group_size" in block and "bits" in block and "quant_method" not in block:
            return block
    return None
