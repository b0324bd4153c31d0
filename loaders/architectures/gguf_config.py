"""config.json from the metadata of a GGUF, and what a GGUF says that config.json has no place for.

llama.cpp's defaults for keys that are missing are those of src/llama-model.cpp (load_hparams).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loaders.architectures.gguf import (
    GGUF_ARCHITECTURE,
    Architecture,
    architecture_named,
    architecture_of,
    read_types,
)
from loaders.architectures.rope import scaling_of, usual_attention_factor
from loaders.dtypes import shortest_decimal

FACTORS = "rope_freqs.weight"
PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
# keys under the architecture's name that are read here, or that follow from others
KNOWN = (
    *PER_LAYER, "block_count", "context_length", "embedding_length", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "attention.sliding_window", "attention.sliding_window_pattern",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.attn_factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor", "vocab_size", "expert_count", "expert_used_count", "expert_feed_forward_length",
)  # fmt: skip
# what types of tensors depend on
FACTS = {
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "expert_count": "num_experts",
}  # fmt: skip
ENDS = ("eos", "eot", "eom")  # the tokens that end a text in llama.cpp: each is one more eos_token_id of transformers


class _Settings:
    """The values under an architecture's name; one value where all layers have the same."""

    def __init__(self, metadata: Mapping[str, Any], architecture: Architecture) -> None:
        self._metadata = metadata
        self._name = architecture.name

    def __call__(self, key: str, default: Any = None) -> Any:
        found = self._metadata.get(f"{self._name}.{key}", default)
        if key in PER_LAYER and isinstance(found, list | tuple) and len(set(found)) == 1:
            return found[0]
        return found


def config_of(
    metadata: Mapping[str, Any], names: Sequence[str], dtype: str, factors: np.ndarray | None = None
) -> dict[str, Any]:
    """Make a config.json from a GGUF's metadata (plain values by key) and tensor names.

    `dtype` is transformers' name for the weights' dtype, `factors` the contents of rope_freqs.weight. The result is
    empty for an unknown architecture. What it cannot express, `faults` says.
    """
    architecture = architecture_named(metadata.get("general.architecture"))
    if architecture is None:
        return {}
    value = _Settings(metadata, architecture)
    heads, experts = value("attention.head_count"), value("expert_count", 0)
    model_type = _model_type(architecture, value)
    config: dict[str, Any] = {
        "architectures": [architecture_of({"model_type": model_type}).classes[model_type]],
        "model_type": model_type,
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "vocab_size": value("vocab_size"),
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": dtype,
        "head_dim": value("attention.key_length"),
        **_tokens(metadata),
        **_sliding(model_type, value),
    }
    tokens = metadata.get("tokenizer.ggml.tokens")
    if config["vocab_size"] is None and isinstance(tokens, list | tuple):
        config["vocab_size"] = len(tokens)
    if experts:
        config["num_local_experts" if model_type == "mixtral" else "num_experts"] = experts
        config["num_experts_per_tok"] = value("expert_used_count")
        if architecture.name == "qwen3moe":
            config |= {"moe_intermediate_size": value("expert_feed_forward_length"), "norm_topk_prob": True}
    # Qwen2's attention always has biases, and its config no such key.
    if any(name.endswith("attn_q.bias") for name in names) and architecture.name != "qwen2":
        config["attention_bias"] = True
    if any(name.endswith("ffn_up.bias") for name in names):
        config["mlp_bias"] = True
    scaling = _scaling(value)
    base = config["rope_theta"]
    if factors is not None and not scaling and _is_positive(base):
        scaling = scaling_of(factors, float(base), config["max_position_embeddings"])
    if scaling:
        config["rope_scaling"] = scaling
    return {key: found for key, found in config.items() if found is not None}


def facts_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp's mixes ask of a GGUF, of whatever architecture it is, under config.json's keys."""
    name = metadata.get("general.architecture")
    facts: dict[str, Any] = {GGUF_ARCHITECTURE: name}
    for key, own in FACTS.items():
        found = metadata.get(f"{name}.{key}")
        found = found[0] if isinstance(found, list | tuple) and found else found
        if type(found) is int:
            facts[own] = found
    return facts


def _model_type(architecture: Architecture, value: _Settings) -> str:
    """Return transformers' model_type. llama.cpp holds Mistral and Mixtral as Llama.

    Without a sliding window a Mistral cannot be told from a Llama, computes the same, and becomes one.
    """
    if architecture.name == "llama" and value("expert_count", 0):
        return "mixtral"
    return "mistral" if architecture.name == "llama" and _window(value) else read_types()[architecture.name][0]


def _window(value: _Settings) -> int:
    found = value("attention.sliding_window", 0)
    return found if type(found) is int else 0


def _tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens; a list for eos if more than one token ends a text."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding", *ENDS)}
    ends = list(dict.fromkeys(ids[name] for name in ENDS if ids[name] is not None))
    eos = None if not ends else ends[0] if len(ends) == 1 else ends
    return {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["padding"]}


def _sliding(model_type: str, value: _Settings) -> dict[str, Any]:
    """Return the settings of layers that attend to a window of tokens only."""
    window, pattern = _window(value), value("attention.sliding_window_pattern")
    if not window:
        return {}
    if model_type in ("mistral", "mixtral"):
        return {"sliding_window": window}
    found: dict[str, Any] = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    if isinstance(pattern, list | tuple):
        first = pattern.index(True) if True in pattern else len(pattern)
        kinds = ["sliding_attention" if each else "full_attention" for each in pattern]
        found |= {"max_window_layers": first, "layer_types": kinds}
    return found


def _scaling(value: _Settings) -> dict[str, Any]:
    """Return the rope scaling that the metadata says; llama.cpp's default is linear, by no factor."""
    kind = value("rope.scaling.type")
    factor = _decimal(value("rope.scaling.factor") or value("rope.scale_linear"))
    if kind == "none" or (kind in (None, "linear") and not factor):
        return {}
    found: dict[str, Any] = {"rope_type": kind or "linear", "factor": factor}
    if kind != "yarn":
        return found
    found["original_max_position_embeddings"] = value("rope.scaling.original_context_length", value("context_length"))
    for name in ("beta_fast", "beta_slow"):
        if value(f"rope.scaling.yarn_{name}") is not None:
            found[name] = _decimal(value(f"rope.scaling.yarn_{name}"))
    said, scale = value("rope.scaling.yarn_attn_factor"), value("rope.scaling.attn_factor")
    if said is not None:
        found["attention_factor"] = _decimal(said)
    elif scale not in (None, 1.0) and _is_positive(factor) and _is_positive(scale):
        found["attention_factor"] = scale * usual_attention_factor(factor)
    return found


def _decimal(value: Any) -> Any:
    return shortest_decimal(value) if isinstance(value, float) else value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


# --- what config.json has no place for


def faults(metadata: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Say what of a GGUF transformers' class cannot compute, so that no config.json would be right."""
    architecture = architecture_named(metadata.get("general.architecture"))
    if architecture is None:
        return []
    value = _Settings(metadata, architecture)
    found = [
        f"{architecture.name}.{key} differs from layer to layer"
        for key in PER_LAYER
        if isinstance(value(key), list | tuple)
    ]
    length = value("attention.key_length")
    for key in ("attention.value_length", "rope.dimension_count"):
        if length is not None and value(key, length) != length:
            found.append(f"{architecture.name}.{key} is {value(key)}, not attention.key_length, {length}")
    if value("attention.sliding_window_pattern") is not None and architecture.name in ("llama", "qwen3moe"):
        found.append(f"{architecture.name}.attention.sliding_window_pattern: only some layers have a window")
    biases = sorted({name.rpartition("blk.")[2].partition(".")[2] for name in names if name.endswith(".bias")})
    if biases and _model_type(architecture, value) in ("mistral", "mixtral"):
        found.append(f"biases ({', '.join(biases)}), which {_model_type(architecture, value)} does not have")
    return [*found, *_scaling_faults(value, FACTORS in names)]


def _scaling_faults(value: _Settings, has_factors: bool) -> list[str]:
    scaling, found = _scaling(value), []
    kind = scaling.get("rope_type")
    if kind not in (None, "linear", "yarn"):
        found.append(f"rope.scaling.type {kind!r}")
    elif kind is not None and not _is_positive(scaling["factor"]):
        found.append(f"rope.scaling.factor {scaling['factor']!r}")
    if has_factors and not _is_positive(value("rope.freq_base", 10000.0)):
        found.append(f"rope.freq_base {value('rope.freq_base')!r}")
    if kind is not None and has_factors:
        found.append(f"{FACTORS} and a rope scaling ({kind}) at once")
    if kind != "yarn" and value("rope.scaling.attn_factor", 1.0) != 1.0:
        found.append(f"rope.scaling.attn_factor {value('rope.scaling.attn_factor')} without yarn")
    return found


def left_out(metadata: Mapping[str, Any]) -> list[str]:
    """Return the keys under the architecture's name, with their values, that config.json does not carry."""
    name = str(metadata.get("general.architecture"))
    beyond = [key for key in metadata if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in KNOWN]
    return [f"{key} = {str(metadata[key])[:40]}" for key in beyond]
