"""The metadata of a GGUF from config.json: what llama.cpp refuses to load without, and what it would guess wrongly.

llama.cpp silently takes 10000 for a missing rope.freq_base, hidden/heads for a missing key_length, and so on. So
everything is written that config.json says, in either of transformers' styles. Models that llama.cpp would compute
differently are refused.

Keys are those of gguf-py (gguf/constants.py); their values follow llama.cpp's conversion/base.py, llama.py and qwen.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from loaders.architectures.family import text_config
from loaders.architectures.gguf import Architecture, number
from loaders.architectures.rope import (
    BETA_FAST,
    BETA_SLOW,
    attention_factor,
    frequency_factors,
    rope_number,
    rope_of,
    usual_attention_factor,
)
from loaders.architectures.windows import ignored_window, said_window, window_of
from loaders.containers.gguf import MetadataValue, booleans, float32, int32s, text, uint32
from loaders.errors import BadSpec
from loaders.layouts.gguf.keys.architecture import COMMON, head_size, keys_of, sliding_base
from loaders.layouts.gguf.keys.checks import CHECKS

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# llama-quantize's name of a file type -> general.file_type (llama_ftype in llama.h)
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32, "TQ1_0": 36,
    "TQ2_0": 37, "MXFP4_MOE": 38, "Q2_K_S": 21, "IQ4_NL": 25,
    "IQ4_XS": 30,
}  # fmt: skip


# keys that llama.cpp refuses to load without, or computes wrongly; of several names in one row, one is enough
NEEDED = (
    ("context_length",), ("embedding_length",), ("attention.head_count",),
    ("feed_forward_length", "expert_feed_forward_length"),
    ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)  # fmt: skip


def general_metadata(architecture: str, label: str) -> dict[str, MetadataValue]:
    """Return what the file is, and how its tensors are stored; `model_card` has what is known of the model."""
    return {
        "general.architecture": text(architecture),
        "general.type": text("model"),
        **quantization_metadata(label),
    }


def quantization_metadata(label: str) -> dict[str, MetadataValue]:
    """Return the keys that quantizing changes."""
    return {
        "general.file_type": uint32(FILE_TYPES[label]),
        "general.quantization_version": uint32(QUANTIZATION_VERSION),
    }


def model_metadata(
    architecture: Architecture, config: Mapping[str, Any], next_tokens: int = 0
) -> dict[str, MetadataValue]:
    """Return ARCHITECTURE.*: the sizes of the model, with `next_tokens` layers for multi-token prediction.

    Raises:
        BadSpec: config.json lacks a size, or asks for what llama.cpp does not compute.
    """
    _check_computed(architecture, config)
    heads, length = number(config, "num_attention_heads"), uint32(head_size(config))
    usual = {
        "vocab_size": None,  # a place for a key that only some architectures have
        "attention.head_count_kv": uint32(number(config, "num_key_value_heads", heads)),
        "attention.key_length": length,
        "attention.value_length": length,
        "rope.dimension_count": None,
        **({} if architecture.own_rope else _rope_metadata(architecture, config)),
        **_window_metadata(config),
    }
    layers = (architecture.layers or number(config, "num_hidden_layers")) + next_tokens
    found = keys_of(architecture, {**config, "block_count": layers}, usual)
    if next_tokens:
        found["nextn_predict_layers"] = uint32(next_tokens)
    missing = [names[0] for names in NEEDED if not found.keys() & {*names}]
    if missing:
        wanted = COMMON[missing[0]][1].replace("|", " or ")
        raise BadSpec(f"config.json: expected {wanted}, which llama.cpp needs as {missing[0]}; found none")
    return {f"{architecture.name}.{key}": entry for key, entry in found.items()}


def _check_computed(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Raise BadSpec if llama.cpp would compute the model differently."""
    activation = text_config(config, architecture.activation, architecture.activations[0])
    if activation not in architecture.activations:
        known = architecture.activations[0]
        raise BadSpec(f"config.json: llama.cpp computes {architecture.name} with {known}, not with {activation}")
    for key, wanted, why in architecture.requires:
        found = text_config(config, key)
        if found is not None and found != wanted:
            raise BadSpec(f"config.json: {why}; {key} is {json.dumps(found)[:60]} here")
    for word in architecture.checks:
        CHECKS[word](config)


def _rope_metadata(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Return the keys of rotary embeddings. Some scalings are tensors instead: see `extra_tensors`."""
    is_sliding = "sliding" in architecture.ropes
    rope = rope_of(config, "full_attention" if is_sliding else None)
    found = {"rope.freq_base": float32(rope_number(rope, "rope_theta", 10000.0))}
    if is_sliding and (local := sliding_base(config)) is not None:
        found["rope.freq_base_swa"] = float32(local)
    if "mrope" in architecture.ropes:
        sections = rope.get("mrope_section", text_config(config, "mrope_section"))
        found["rope.dimension_sections"] = int32s(_sections(sections))
    kind = rope.get("rope_type", "default")
    if kind in ("default", *architecture.ropes) or frequency_factors(rope, head_size(config)) is not None:
        return found
    if kind not in ("linear", "yarn") or "factor" not in rope:
        raise BadSpec(f"config.json: rope scaling {kind!r} is not converted to GGUF here; linear, yarn and llama3 are")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise BadSpec("config.json: llama.cpp rotates whole heads; partial_rotary_factor is not 1 here")
    found |= {"rope.scaling.type": text(kind), "rope.scaling.factor": float32(rope_number(rope, "factor"))}
    return found | (_yarn_metadata(architecture, rope) if kind == "yarn" else {})


def _sections(sections: Any) -> list[int]:
    """Return the parts of a head that are rotated by time, height and width, with the zero for a fourth."""
    is_right = isinstance(sections, list) and len(sections) <= 4 and all(type(n) is int and n >= 0 for n in sections)
    if not is_right:
        raise BadSpec(f"config.json: expected up to four whole numbers as mrope_section, found {sections!r}")
    return [*sections, 0, 0, 0, 0][:4]


def _yarn_metadata(architecture: Architecture, rope: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Return the keys of yarn.

    The converter writes yarn_attn_factor, which llama.cpp reads for other architectures only. For these it multiplies
    the usual factor by that under attn_factor (src/llama-context.cpp), so that this is written as well.
    """
    if rope.get("truncate", True) is False and not architecture.rounds_ramp:
        raise BadSpec("config.json: llama.cpp's yarn rounds the range of its ramp; truncate is false here")
    found = {"rope.scaling.original_context_length": uint32(int(rope_number(rope, "original_max_position_embeddings")))}
    said = attention_factor(rope)
    if said is not None:
        usual = usual_attention_factor(rope_number(rope, "factor"))
        found["rope.scaling.yarn_attn_factor"] = float32(said)
        if np.float32(said / usual) != 1:
            found["rope.scaling.attn_factor"] = float32(said / usual)
    for name in ("beta_fast", "beta_slow"):
        if rope.get(name):  # transformers takes 0 for the default, too
            found[f"rope.scaling.yarn_{name}"] = float32(rope_number(rope, name))
    return found


def _window_metadata(config: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Return the keys of a sliding window, which llama.cpp does not compute for these architectures."""
    found = window_of(config)
    if found is None:
        return {}
    layers = {} if found.layers is None else {"attention.sliding_window_pattern": booleans(found.layers)}
    return {"attention.sliding_window": uint32(found.tokens), **layers}


def not_computed(
    architecture: Architecture, config: Mapping[str, Any], metadata: Mapping[str, MetadataValue]
) -> list[str]:
    """Say what config.json says and llama.cpp does not compute, or only if it is told so on its command line."""
    said = ignored_window(config, "llama.cpp")
    tokens = None if "sliding_window" in architecture.ignored else said_window(config)
    if tokens is not None and f"{architecture.name}.attention.sliding_window" not in metadata:
        said.append(
            f"llama.cpp computes {config.get('model_type')} without the sliding window of {tokens} tokens that"
            " config.json says: longer texts come out otherwise where transformers has it"
        )
    rope = {} if architecture.own_rope else rope_of(config, "full_attention")
    if rope.get("truncate", True) is False and rope.get("rope_type") == "yarn":
        said.append("llama.cpp rounds the range of yarn's ramp, which transformers does not for this model")
    for name, usual in (("beta_fast", BETA_FAST), ("beta_slow", BETA_SLOW)):
        found = rope_number(rope, name) if rope.get("rope_type") == "yarn" and rope.get(name) else usual
        if found != usual:
            said.append(
                f"llama.cpp does not read yarn's {name} for {architecture.name} and takes {usual:g}: give it"
                f" --yarn-{name.replace('_', '-')} {found:g} whenever you run the model (the GGUF says it, too)"
            )
    return said
