"""The metadata of a GGUF from config.json: what llama.cpp refuses to load without, and what it would guess wrongly.

llama.cpp silently takes 10000 for a missing rope.freq_base, hidden/heads for a missing key_length, and so on. So
everything is written that config.json says, in either of transformers' styles. Models that llama.cpp would compute
differently are refused.

Keys are those of gguf-py (gguf/constants.py); their values follow llama.cpp's conversion/base.py, llama.py and qwen.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from loaders.architectures.families import text_config
from loaders.architectures.gguf import Architecture, experts_of, number, rope_of
from loaders.containers.gguf import MetadataValue, float32, text, uint32
from loaders.errors import BadSpec

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# llama-quantize's name of a file type -> general.file_type (llama_ftype in llama.h)
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32, "TQ1_0": 36,
    "TQ2_0": 37, "MXFP4_MOE": 38,
}  # fmt: skip


def general_metadata(architecture: str, model: str, label: str) -> dict[str, MetadataValue]:
    """Return general.*: what the file is, and how its tensors are stored."""
    return {
        "general.architecture": text(architecture),
        "general.type": text("model"),
        "general.name": text(model),
        **quantization_metadata(label),
    }


def quantization_metadata(label: str) -> dict[str, MetadataValue]:
    """Return the keys that quantizing changes."""
    return {
        "general.file_type": uint32(FILE_TYPES[label]),
        "general.quantization_version": uint32(QUANTIZATION_VERSION),
    }


def model_metadata(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Return ARCHITECTURE.*: the sizes of the model.

    Raises:
        BadSpec: config.json lacks a size, or asks for what llama.cpp does not compute.
    """
    _check_computed(architecture, config)
    heads, hidden = number(config, "num_attention_heads"), number(config, "hidden_size")
    head = text_config(config, "head_dim")
    length = number(config, "head_dim") if head is not None else hidden // max(1, heads)
    epsilon = text_config(config, "rms_norm_eps")
    if not isinstance(epsilon, float | int) or isinstance(epsilon, bool):
        raise BadSpec(f"config.json: expected a number as rms_norm_eps, found {epsilon!r}")
    found = {
        "block_count": uint32(number(config, "num_hidden_layers")),
        "context_length": uint32(number(config, "max_position_embeddings")),
        "embedding_length": uint32(hidden),
        "feed_forward_length": uint32(number(config, "intermediate_size")),
        "attention.head_count": uint32(heads),
        "attention.head_count_kv": uint32(number(config, "num_key_value_heads", heads)),
        "attention.layer_norm_rms_epsilon": float32(float(epsilon)),
        "attention.key_length": uint32(length),
        "attention.value_length": uint32(length),
        "rope.dimension_count": uint32(length),
        "vocab_size": uint32(number(config, "vocab_size")),
        **_rope_metadata(config),
        **_expert_metadata(architecture, config),
    }
    return {f"{architecture.name}.{key}": entry for key, entry in found.items()}


def _check_computed(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Raise BadSpec if llama.cpp would compute the model differently."""
    activation = text_config(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise BadSpec(f"config.json: llama.cpp computes {architecture.name} with silu, not with {activation}")
    if architecture.name == "qwen3moe":
        if not text_config(config, "norm_topk_prob", False):
            raise BadSpec("config.json: llama.cpp always normalizes the experts' weights; norm_topk_prob is false here")
        if text_config(config, "mlp_only_layers") or text_config(config, "decoder_sparse_step", 1) != 1:
            raise BadSpec("config.json: llama.cpp takes every layer of qwen3moe for a mixture; some here are dense")


def _expert_metadata(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, MetadataValue]:
    count = experts_of(config)
    if not count:
        return {}
    found = {
        "expert_count": uint32(count),
        "expert_used_count": uint32(number(config, "num_experts_per_tok")),
    }
    if architecture.name == "qwen3moe":
        found["expert_feed_forward_length"] = uint32(number(config, "moe_intermediate_size"))
    return found


def _rope_metadata(config: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Return the keys of rotary embeddings. Llama 3.1's scaling is a tensor instead: see `rope_factors`."""
    rope = rope_of(config)
    found = {"rope.freq_base": float32(float(rope.get("rope_theta", 10000.0)))}
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return found
    if kind not in ("linear", "yarn") or "factor" not in rope:
        raise BadSpec(f"config.json: rope scaling {kind!r} is not converted to GGUF here; linear, yarn and llama3 are")
    found |= {"rope.scaling.type": text(kind), "rope.scaling.factor": float32(float(rope["factor"]))}
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or number(config, "max_position_embeddings")
        found["rope.scaling.original_context_length"] = uint32(int(length))
        for key, name in (
            ("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"),
        ):  # fmt: skip
            if rope.get(key) is not None:
                found[f"rope.scaling.yarn_{name}"] = float32(float(rope[key]))
    return found


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """Return the divisors of the frequencies in Llama 3.1's rope scaling: float32 (head/2,); None for another scaling.

    They are the tensor rope_freqs.weight. The arithmetic is float32, as in llama.cpp's converter (conversion/llama.py,
    generate_extra_tensors), and gives the same but for the last bit of a power.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    try:
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original, base = float(rope["original_max_position_embeddings"]), float(rope.get("rope_theta", 10000.0))
    except (KeyError, TypeError, ValueError) as error:
        raise BadSpec(f"config.json: the llama3 rope scaling lacks {error}") from None
    length = text_config(config, "head_dim")
    if length is None:
        length = number(config, "hidden_size") // number(config, "num_attention_heads")
    frequencies = 1.0 / base ** (np.arange(0, length, 2, dtype=np.float32) / np.float32(length))
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    long = np.where(wavelengths > original / low, np.float32(factor), between)
    return np.where(wavelengths < original / high, np.float32(1), long).astype(np.float32)
