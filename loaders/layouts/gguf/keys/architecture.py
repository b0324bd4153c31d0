"""An architecture's keys of metadata: those that all have, and what its family's file says of its own.

The common ones are those of TextModel.set_gguf_parameters in llama.cpp's conversion/base.py, under all the names that
config.json has for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from loaders.architectures.family import text_config
from loaders.architectures.gguf import Architecture, number
from loaders.architectures.rope import rope_number, rope_of
from loaders.containers.gguf import MetadataValue, boolean, booleans, float32, int32s, text, uint32
from loaders.errors import BadSpec
from loaders.layouts.gguf.keys.by_layer import MADE_BY_LAYER
from loaders.layouts.gguf.keys.encoders import MADE_ENCODERS
from loaders.layouts.gguf.keys.latent import MADE_LATENT

Config = Mapping[str, Any]
Keys = dict[str, MetadataValue | None]  # None takes a key away

# GGUF's key -> its type, and the names that config.json has for it, of which the first counts that is there
COMMON = {
    "context_length": (
        "uint32",
        "max_position_embeddings|n_ctx|n_positions|max_length|max_sequence_length|model_max_length",
    ),
    "embedding_length": ("uint32", "hidden_size|n_embd|dim"),
    "feed_forward_length": (
        "uint32",
        "prefix_dense_intermediate_size|dense_intermediate_size|intermediate_size|n_inner|hidden_dim",
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
LONGROPE_FACTORS = ("attention_factor", "short_mscale", "long_mscale")
GATE_NAMES = (
    "score_function|scoring_func|score_func|moe_router_activation|moe_router_activation_func|expert_selection_fn"
)


def keys_of(
    architecture: Architecture, config: Config, usual: Mapping[str, MetadataValue | None]
) -> dict[str, MetadataValue]:
    """Return the keys that all architectures have, and this one's own, without its name before them.

    `usual` are keys that follow from more than one value of config.json; the architecture's own take their places.
    `config` says, too, how many layers are written: block_count, with those for multi-token prediction.

    Raises:
        BadSpec: config.json has another kind of value where a number is needed, or lacks what a key is made of.
    """
    found: Keys = {**usual, "block_count": uint32(number(config, "block_count"))}
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


def kinds_of_layers(config: Config) -> list[str]:
    """Return the kind of each layer."""
    found, count = text_config(config, "layer_types"), number(config, "num_hidden_layers")
    if not isinstance(found, list) or len(found) != count or not all(isinstance(kind, str) for kind in found):
        raise BadSpec(f"config.json: expected the kinds of {count} layers as layer_types, found {found!r:.80}")
    return found


def sliding_base(config: Config) -> float | None:
    """Return the base of rotary embeddings in layers with a sliding window, if config.json says it."""
    block = text_config(config, "rope_parameters")
    if isinstance(block, Mapping) and "sliding_attention" in block:
        return rope_number(rope_of(config, "sliding_attention"), "rope_theta", 10000.0)
    local = _value(config, "local_rope_theta|swa_rope_theta|rope_local_base_freq")
    return None if local is None else rope_number({"rope_theta": local}, "rope_theta")


def whole_rotary(config: Config) -> Keys:
    """All of a head is rotated."""
    return {"rope.dimension_count": uint32(head_size(config))}


def partial_rotary(config: Config) -> Keys:
    """The part of a head that is rotated: all of it if config.json says nothing."""
    return _rotary(config, 1.0)


def half_rotary(config: Config) -> Keys:
    """The part of a head that is rotated: half of it if config.json says nothing."""
    return _rotary(config, 0.5)


def _rotary(config: Config, usual: float) -> Keys:
    said = text_config(config, "partial_rotary_factor")
    factor = rope_of(config, "full_attention").get("partial_rotary_factor", said)
    factor = rope_number({"partial_rotary_factor": factor}, "partial_rotary_factor", usual)
    return {"rope.dimension_count": uint32(int(head_size(config) * factor))}


def linear_attention(config: Config) -> Keys:
    """Which layers are recurrent, and the size of their state."""
    if text_config(config, "layer_types") is None:
        every = max(1, number(config, "full_attention_interval", 4))
        recurrent = [bool((layer + 1) % every) for layer in range(number(config, "num_hidden_layers"))]
    else:
        recurrent = [kind == "linear_attention" for kind in kinds_of_layers(config)]
    after = number(config, "block_count") - len(recurrent)
    inner = number(config, "linear_value_head_dim") * number(config, "linear_num_value_heads")
    return {
        "attention.recurrent_layers": booleans([*recurrent, *[False] * after]), "ssm.inner_size": uint32(inner),
    }  # fmt: skip


def deepstack(config: Config) -> Keys:
    """How many of the first layers take features of an image."""
    vision = config.get("vision_config")
    indexes = vision.get("deepstack_visual_indexes") if isinstance(vision, Mapping) else None
    return {"n_deepstack_layers": uint32(len(indexes) if isinstance(indexes, list) else 0)}


def every_second_full(config: Config) -> Keys:
    """The layers with a window, where they are not the first of every two."""
    return _window_pattern(config, 2)


def every_sixth_full(config: Config) -> Keys:
    """The layers with a window, where they are not the first five of every six."""
    return _window_pattern(config, 6)


def _window_pattern(config: Config, turn: int) -> Keys:
    """Return the layers with a window where llama.cpp would take others: it takes the last of each `turn` as full."""
    layers, own = range(number(config, "num_hidden_layers")), _value(config, "sliding_window_pattern") or turn
    usual = [layer % turn < turn - 1 for layer in layers]
    if text_config(config, "layer_types") is not None:
        found = [kind == "sliding_attention" for kind in kinds_of_layers(config)]
    else:
        own = number({"sliding_window_pattern": own}, "sliding_window_pattern")
        found = [layer % own < own - 1 for layer in layers]
    return {} if found == usual else {"attention.sliding_window_pattern": booleans(found)}


def of_full_attention(config: Config, key: str, own: str) -> int | None:
    """Return a size in layers of full attention: under a key of its own, or that of the first such layer."""
    if text_config(config, own) is not None:
        return number(config, own)
    layers = text_config(config, "per_layer_config")
    for layer, kind in enumerate(kinds_of_layers(config)):
        settings = layers.get(str(layer)) if isinstance(layers, Mapping) else None
        if kind == "full_attention" and isinstance(settings, Mapping) and key in settings:
            return number(settings, key)
    return None


def two_sizes_of_heads(config: Config) -> Keys:
    """Heads of one size in layers with a window, and of another in those of full attention: Gemma 4's."""
    sliding = [kind == "sliding_attention" for kind in kinds_of_layers(config)]
    size = number(config, "head_dim")
    full = of_full_attention(config, "head_dim", "global_head_dim") or size
    keys = {f"attention.{part}_length": uint32(full) for part in ("key", "value")}
    keys |= {f"attention.{part}_length_swa": uint32(size) for part in ("key", "value")}
    heads = of_full_attention(config, "num_key_value_heads", "num_global_key_value_heads")
    if heads is not None:
        own = number(config, "num_key_value_heads")
        keys["attention.head_count_kv"] = int32s([own if is_sliding else heads for is_sliding in sliding])
    rotated = {"rope.dimension_count": uint32(full), "rope.dimension_count_swa": uint32(size)}
    return {**keys, **rotated, "attention.sliding_window_pattern": booleans(sliding)}


def wide_shared_layers(config: Config) -> Keys:
    """Dense layers of twice the size in the last layers, which share keys and values: Gemma 4's E2B and E4B."""
    if not text_config(config, "use_double_wide_mlp", False):
        return {}
    layers, size = number(config, "num_hidden_layers"), number(config, "intermediate_size")
    first = layers - number(config, "num_kv_shared_layers", 0)
    return {"feed_forward_length": int32s([size if layer < first else 2 * size for layer in range(layers)])}


def longrope(config: Config) -> Keys:
    """The length of texts before the scaling, and by how much the scaling multiplies: Phi's."""
    rope = rope_of(config, "full_attention")
    original = rope.get("original_max_position_embeddings", text_config(config, "original_max_position_embeddings"))
    if original is None:
        return {}
    before = rope_number({"original_max_position_embeddings": original}, "original_max_position_embeddings")
    found: Keys = {"rope.scaling.original_context_length": uint32(int(before))}
    if not rope.get("long_factor"):
        return found
    scale = number(config, "max_position_embeddings") / before
    factor = math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1 else 1.0
    said = {rope_number(rope, key) for key in LONGROPE_FACTORS if rope.get(key) is not None}
    if len(said) > 1:
        raise BadSpec("config.json: llama.cpp scales short and long texts by one factor; these have several")
    return {**found, "rope.scaling.attn_factor": float32(said.pop() if said else factor)}


MADE: dict[str, Callable[[Config], Keys]] = {
    each.__name__: each
    for each in (
        whole_rotary, partial_rotary, linear_attention, deepstack, every_second_full, every_sixth_full,
        two_sizes_of_heads, wide_shared_layers, longrope, half_rotary,
    )
} | MADE_BY_LAYER | MADE_LATENT | MADE_ENCODERS  # fmt: skip
