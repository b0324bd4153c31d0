"""An architecture's keys of metadata: those that all have, and what its family's file says of its own.

The common ones are those of TextModel.set_gguf_parameters in llama.cpp's conversion/base.py, under all the names that
config.json has for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loaders.architectures.families import text_config
from loaders.architectures.gguf import Architecture, number
from loaders.architectures.rope import rope_number, rope_of
from loaders.containers.gguf import MetadataValue, boolean, float32, text, uint32
from loaders.errors import BadSpec
from loaders.layouts.gguf.keys_by_layer import MADE_BY_LAYER, MADE_HYBRID
from loaders.layouts.gguf.keys_latent import MADE_LATENT

Config = Mapping[str, Any]
Keys = dict[str, MetadataValue | None]  # None takes a key away

# GGUF's key -> its type, and the names that config.json has for it, of which the first counts that is there
COMMON = {
    "context_length": ("uint32", "max_position_embeddings|n_ctx|n_positions|max_length|max_sequence_length"),
    "embedding_length": ("uint32", "hidden_size|n_embd|dim"),
    "feed_forward_length": (
        "uint32",
        "prefix_dense_intermediate_size|dense_intermediate_size|intermediate_size|n_inner",
    ),
    "attention.head_count": ("uint32", "num_attention_heads|n_head|n_heads"),
    "attention.head_count_kv": ("uint32", "num_key_value_heads|n_kv_heads"),
    "attention.layer_norm_rms_epsilon": ("float32", "rms_norm_eps|norm_eps"),
    "attention.layer_norm_epsilon": ("float32", "layer_norm_eps|layer_norm_epsilon|norm_epsilon"),
    "expert_count": ("uint32", "num_local_experts|num_experts|n_routed_experts"),
    "expert_used_count": ("uint32", "num_experts_per_tok|num_experts_per_token|top_k_experts"),
    "expert_group_count": ("uint32", "n_group"),
    "expert_group_used_count": ("uint32", "topk_group"),
    "attention.key_length": ("uint32", "head_dim"),
    "attention.value_length": ("uint32", "head_dim"),
}
MAKE: dict[str, Callable[[Any], MetadataValue]] = {
    "uint32": uint32, "float32": lambda value: float32(float(value)), "bool": boolean, "text": text, "flag": boolean,
}  # fmt: skip
GATES = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}  # gguf-py's ExpertGatingFuncType
GATE_NAMES = (
    "score_function|scoring_func|score_func|moe_router_activation|moe_router_activation_func|expert_selection_fn"
)


def keys_of(architecture: Architecture, config: Config, usual: Mapping[str, MetadataValue | None], blocks: int) -> Keys:
    """Return the keys that all architectures have, and this one's own, without its name before them.

    `usual` are keys that follow from more than one value of config.json; the architecture's own take their places.
    `blocks` is the number of layers in the file.

    Raises:
        BadSpec: config.json has another kind of value where a number is needed, or lacks what a key is made of.
    """
    found = {**usual, "block_count": uint32(architecture.layers)}
    for key, row in COMMON.items():
        found |= _key(key, row, config)
    gate = _value(config, GATE_NAMES)
    if gate is not None:
        if gate not in GATES:
            raise BadSpec(f"config.json: llama.cpp chooses experts by {', '.join(GATES)}, not by {gate!r}")
        found["expert_gating_func"] = uint32(GATES[gate])
    for key, own in architecture.keys.items():
        found |= {key: None} if own is None else _key(key, own, config)
    for word in architecture.made:
        found |= MADE[word](config)
    for word in architecture.by_layer:
        found |= MADE_BY_LAYER[word](config, blocks)
    return {key: value for key, value in found.items() if value is not None}


def _key(key: str, row: Any, config: Config) -> Keys:
    kind, source, *default = row
    value = _value(config, source) if isinstance(source, str) else source
    value = default[0] if value is None and default else value
    if value is None or (kind == "flag" and value is False):
        return {}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_right = {
        "uint32": type(value) is int and value >= 0, "float32": is_number, "bool": isinstance(value, bool),
        "flag": isinstance(value, bool), "text": isinstance(value, str),
    }[kind]  # fmt: skip
    if not is_right:
        words = {"uint32": "a whole number", "float32": "a number", "text": "a text"}
        wanted = words.get(kind, "true or false")
        raise BadSpec(f"config.json: expected {wanted} as {source}, found {value!r}")
    return {key: MAKE[kind](value)}


def _value(config: Config, names: str) -> Any:
    """Return the first of config.json's values by several names, parted by |."""
    return next((v for name in names.split("|") if (v := text_config(config, name)) is not None), None)


# --- keys that are made of several of config.json's


def head_size(config: Config) -> int:
    """Return the size of a head, as config.json says it or as it follows."""
    if text_config(config, "head_dim") is not None:
        return number(config, "head_dim")
    return number(config, "hidden_size") // max(1, number(config, "num_attention_heads"))


def whole_rotary(config: Config) -> Keys:
    """All of a head is rotated."""
    return {"rope.dimension_count": uint32(head_size(config))}


def partial_rotary(config: Config) -> Keys:
    """The part of a head that is rotated."""
    factor = _rotary_factor(config, 1.0)
    return {"rope.dimension_count": uint32(int(head_size(config) * factor))}


def half_rotary(config: Config) -> Keys:
    """The part of a head that is rotated, where config.json means a half if it says nothing."""
    factor = _rotary_factor(config, 0.5)
    return {"rope.dimension_count": uint32(int(head_size(config) * factor))}


def _rotary_factor(config: Config, default: float) -> float:
    """Return the part of a head that is rotated, from either of the places where config.json may say it."""
    rope = rope_of(config)
    found = rope.get("partial_rotary_factor", text_config(config, "partial_rotary_factor"))
    return rope_number({**rope, "partial_rotary_factor": found}, "partial_rotary_factor", default)


MADE: dict[str, Callable[[Config], Keys]] = {
    **{each.__name__: each for each in (whole_rotary, partial_rotary, half_rotary)},
    **MADE_HYBRID,
    **MADE_LATENT,
}
