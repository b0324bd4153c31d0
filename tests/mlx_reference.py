"""mlx-lm's own conversion of a tiny checkpoint, which ours is held against: mlx_lm.convert without a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from tests import tiny_models
from tests.engines import mlx_lm_or_skip
from tests.tiny_configs import EXPERTS, GEMMA4, LATENT, ROUTED, ROWS, SIZES, TINY, VISION, Tiny, text
from tests.tiny_models import merged

GROUP = 32
# What a type's published config.json says, and the tiny one does not, which transformers' class has saved.
GIVEN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4},
    "qwen3_vl_moe": {"text_config": {"num_experts": 4, "tie_word_embeddings": False}},
    "gemma3": {"text_config": {"sliding_window_pattern": 2}},
    "gemma3_text": {"sliding_window_pattern": 2},
    "cohere2": {"sliding_window_pattern": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "mamba2": {"intermediate_size": 128},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "solar_open": {"partial_rotary_factor": 1.0},
    "gemma4_text": {"global_head_dim": 64, "num_global_key_value_heads": 1},
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gpt2": {"n_ctx": 64},
    "gemma4": {"text_config": {"global_head_dim": 64, "num_global_key_value_heads": 1}},
    "gemma4_moe": {"text_config": {"global_head_dim": 64, "num_global_key_value_heads": 1}},
    "gemma4_per_layer": {"text_config": {"global_head_dim": 64}},
}
FLOATS = ("float16", "bfloat16", "float32")

# Tiny checkpoints that mlx-lm does not convert so; tests/parity/test_mlx_models.py holds gpt-oss against transformers.
APART = {
    "gpt_oss": "mlx-lm reads this type's experts in MXFP4 only",
    "gpt_oss_mxfp4": "mlx-lm keeps MXFP4 experts as they are, where the preset asks for affine groups",
    "phi3_long": "for llama.cpp's factors of longrope",
    "olmo3_yarn": "for llama.cpp's scalings by kind of layer",
    "exaone4_windows": "for llama.cpp, which has windows in models of 64 layers only",
    "hunyuan_v1_alpha": "for llama.cpp's base of frequencies",
}
# Types of tests/tiny_configs.py for which no section is written.
LACKS = {
    "deepseek_v4": "mlx-lm has no such model",
    "step3p7": "mlx-lm has no such model, only step3p5 without the tower",
    "hunyuan_v1_moe": "mlx-lm has no such model, only hunyuan, which reads another config.json",
    "bert": "mlx-lm has no encoders",
    "roberta": "mlx-lm has no encoders",
    "xlm-roberta": "mlx-lm has no encoders",
    "modernbert": "mlx-lm has no encoders",
}
# mlx-lm leaves out the layer for multi-token prediction only where its number is 61, as in the published model.
LOOSE = ("deepseek_v3",)
# Sizes that mlx-lm takes for granted, and layers as the published models have them, where the tiny one differs.
CHANGED: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {"indexer_types": ["full"] * 3},
    "cohere2": {"head_dim": 16},
    "exaone4": {"head_dim": 16},
    "falcon_h1": {  # those of the small ones; of the published layouts' sizes, none has any but 1
        "embedding_multiplier": 5.656854249492381,
        "lm_head_multiplier": 0.0390625,
        "key_multiplier": 0.390625,
        "attention_in_multiplier": 1.25,
        "attention_out_multiplier": 0.9375,
        "ssm_in_multiplier": 1.25,
        "mlp_multipliers": [0.8838834764831844, 0.5859375],
        "ssm_out_multiplier": 0.23570226039551587,
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    },
    "phimoe": {"head_dim": 16},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1, 1]},
}
# Types of which only mlx-lm's side is held against ours.
MORE: dict[str, Tiny] = {
    "cohere": Tiny(model_type="cohere", config=SIZES),
    "phi": Tiny(model_type="phi", config=SIZES),
    "stablelm": Tiny(model_type="stablelm", config=SIZES),
    "helium": Tiny(model_type="helium", config={**SIZES, "head_dim": 16}),
    "apertus": Tiny(model_type="apertus", config=SIZES),
    "gpt_neox": Tiny(model_type="gpt_neox", config=SIZES),
    "qwen2_vl": Tiny(
        model_type="qwen2_vl",
        base="qwen2-vl-7b",
        config={
            **SIZES,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
        },
    ),
    "gemma4_text": Tiny(
        model_type="gemma4_text", tokenizer="bpe_spaces", config=text(**GEMMA4, hidden_size_per_layer_input=0)
    ),
    "glm4_moe_lite": Tiny(model_type="glm4_moe_lite", config={**SIZES, **ROUTED, **LATENT}),
    "gpt2": Tiny(
        model_type="gpt2",
        base="gpt2",
        renames=((r"^transformer\.", ""),),
        config={"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "vocab_size": ROWS},
    ),
    "glm": Tiny(model_type="glm", config=text()),
    "mamba": Tiny(
        model_type="mamba", config={"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": ROWS, "state_size": 16}
    ),
    "falcon_mamba": Tiny(
        model_type="falcon_mamba",
        config={"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": ROWS, "state_size": 16},
    ),
    "step3p5": replace(TINY["step3p7"], next_tokens=""),
    "exaone_moe": Tiny(
        model_type="exaone_moe",
        config=text(
            **EXPERTS,
            layer_types=["sliding_attention", "full_attention"],
            mlp_layer_types=["dense", "sparse"],
            is_moe_layer=[False, True],
            num_shared_experts=1,
            sliding_window=16,
        ),
    ),
    "solar_open": Tiny(model_type="solar_open", config=text(**{**ROUTED, "first_k_dense_replace": 0})),
    "llava": Tiny(
        model_type="llava",
        base="pixtral-12b",
        config={"text_config": text(), "vision_config": {**VISION, "head_dim": 16}},
    ),
    "mistral4": Tiny(model_type="mistral4", config={**SIZES, **ROUTED, **LATENT}),
}


Made = tuple[dict[str, Any], dict[str, Any]]


def turned(config: dict[str, Any], tensors: dict[str, Any]) -> Made:
    """Return a model with stacks [experts, inputs, outputs] as published, which transformers 5 turns."""
    return config, {n: (d, (s[0], *s[:0:-1]) if ".experts." in n else s) for n, (d, s) in tensors.items()}


def step_text(config: dict[str, Any], tensors: dict[str, Any]) -> Made:
    """Return the language model of Step 3.7, with config.json in the words of Step 3.5."""
    prefix = "model.language_model."
    own = {
        n.replace(prefix, "model."): t
        for n, t in tensors.items()
        if n.startswith((prefix, "lm_head", "model.layers", "model.embed_tokens", "model.norm"))
    }
    return {**TINY["step3p7"].config["text_config"], "dtype": "bfloat16", "tie_word_embeddings": False}, own


def with_shared_keys(config: dict[str, Any], tensors: dict[str, Any]) -> Made:
    """Return a model with the keys and values that its last layers do not use."""
    more = {n.replace(f"layers.{i}.", f"layers.{i + 2}."): t for n, t in tensors.items() for i in (0, 1)
            if f"language_model.layers.{i}." in n and re.search(r"self_attn\.(?:[kv]_proj|k_norm)", n)}  # fmt: skip
    return config, {**tensors, **more}


ALTERED = {
    "step3p5": step_text,
    "gemma4_per_layer": with_shared_keys,
}
# Kinds of altered ones whose model type is the kind's name.
OWN_TYPES = ("step3p5",)


def make(kind: str, folder: Path) -> Path:
    """Write the tiny checkpoint of a type as mlx-lm can read it; returns its folder."""
    tiny = TINY.get(kind) or MORE[kind]
    made = tiny_models.model_of
    alter = ALTERED.get(kind, lambda config, tensors: (config, tensors))
    altered = patch.object(tiny_models, "model_of", lambda kind: alter(*made(kind)))
    with altered, patch.dict(TINY, {kind: replace(tiny, config=merged(tiny.config, CHANGED.get(kind, {})))}):
        return tiny_models.make(kind, folder)


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with settings where checkpoints of transformers 4 have them, which mlx-lm reads."""
    made = {key: published(part) if key == "text_config" else part for key, part in config.items()}
    if isinstance(text := made.get("text_config"), dict):
        for one, other, key in ((made, text, "vocab_size"), (text, made, "tie_word_embeddings")):
            if key in other:
                one.setdefault(key, other[key])
    rope, is_gemma3 = config.get("rope_parameters"), str(config.get("model_type")).startswith("gemma3")
    if not isinstance(rope, Mapping) or str(config.get("model_type")).startswith("gemma4"):
        return made
    if is_gemma3 and isinstance(local := rope.get("sliding_attention"), Mapping):
        made["rope_local_base_freq"] = local.get("rope_theta")
    if isinstance(rope.get("full_attention"), Mapping):
        rope = rope["full_attention"]
    made.setdefault("rope_theta", rope.get("rope_theta"))
    made.setdefault("rope_scaling", dict(rope) if rope.get("rope_type", "default") != "default" else None)
    if rope.get("partial_rotary_factor") is not None:
        made.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    return made


def theirs(source: Path, out: Path, config: Mapping[str, Any], *, strict: bool = True, recipe: str = "") -> Any:
    """Convert a checkpoint by mlx-lm's functions; returns its model. `config` adds to config.json.

    Without `strict`, mlx-lm leaves out tensors that its model lacks, which it else refuses.
    """
    utils = mlx_lm_or_skip()
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    whole = merged(published(utils.load_config(source)), config)
    model, config = utils.load_model(source, lazy=True, strict=strict, model_config=whole)
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if name in FLOATS:
        chosen = getattr(model, "cast_predicate", lambda _: True)
        model.update(
            tree_map_with_path(
                lambda key, value: (
                    value.astype(getattr(mx, name))
                    if chosen(key) and mx.issubdtype(value.dtype, mx.floating)
                    else value
                ),
                model.parameters(),
            )
        )
    mixed = import_module("mlx_lm.convert").mixed_quant_predicate_builder
    predicate = mixed(recipe, model, GROUP) if recipe else None
    model, config = utils.quantize_model(model, config, GROUP, 4, quant_predicate=predicate)
    utils.save_model(out, model)
    utils.save_config(config, out / "config.json")
    return model


def logits(model: Any) -> np.ndarray:
    import mlx.core as mx

    ids = np.random.default_rng(1).integers(3, 300, (1, 9))
    return np.array(model(mx.array(ids)).astype(mx.float32))
