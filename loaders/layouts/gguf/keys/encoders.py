"""Keys of metadata of encoders and of state spaces, as words of a family's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loaders.architectures.family import text_config
from loaders.architectures.gguf import number
from loaders.architectures.layer_kinds import layer_count
from loaders.architectures.rope import rope_number, rope_of
from loaders.containers.gguf import MetadataValue, float32, int32s, text, texts, uint32
from loaders.errors import BadSpec

Config = Mapping[str, Any]
Keys = dict[str, MetadataValue | None]

POOLINGS = {"mean": 1, "cls": 2, "lasttoken": 3}  # gguf-py's PoolingType
CLASSES = "SequenceClassification"


# --- state spaces


def state_heads(config: Config) -> Keys:
    """The width of Mamba 2's channels and the number of its heads.

    Raises:
        BadSpec: the width is not the one that the model's expansion makes.
    """
    width = number(config, "expand", 2) * number(config, "hidden_size")
    inner = number(config, "intermediate_size", number(config, "d_inner", width))
    size = number(config, "head_dim", 64)
    if inner != width or size < 1 or inner % size:
        raise BadSpec(f"config.json: expected {width} channels in heads of one size, found {inner} and head_dim {size}")
    return {"ssm.inner_size": uint32(inner), "ssm.time_step_rank": uint32(inner // size)}


def step_rank(config: Config) -> Keys:
    """The rank of the projection to time steps, a sixteenth of the width if it is auto."""
    found = text_config(config, "mamba_dt_rank", "auto")
    rank = -(-number(config, "hidden_size") // 16) if found == "auto" else number(config, "mamba_dt_rank")
    return {"ssm.time_step_rank": uint32(rank)}


def attention_in_turn(config: Config) -> Keys:
    """Heads of keys and values for each layer: Jamba has attention in one layer of each turn."""
    heads = number(config, "num_key_value_heads", number(config, "num_attention_heads"))
    first, turn = number(config, "attn_layer_offset"), max(1, number(config, "attn_layer_period"))
    layers = range(layer_count(config) or 0)
    return {"attention.head_count_kv": int32s([heads if n >= first and (n - first) % turn == 0 else 0 for n in layers])}


# --- encoders


def positions_after_padding(config: Config) -> Keys:
    """The number of positions after that of the padding."""
    longest = number(config, "max_position_embeddings")
    if text_config(config, "pad_token_id") is None:
        return {}
    return {"context_length": uint32(max(0, longest - number(config, "pad_token_id") - 1))}


def class_heads(config: Config) -> list[str]:
    """Return what the model's classes are for: SequenceClassification of BertForSequenceClassification."""
    names = config.get("architectures")
    return [str(name).partition("For")[2] for name in names if "For" in str(name)] if isinstance(names, list) else []


def class_labels(config: Config) -> Keys:
    """The names of a classifier's classes, unless they are transformers' own two."""
    found = config.get("id2label")
    if not isinstance(found, Mapping) or not found:
        return {}
    if not all(str(key).isdecimal() and isinstance(label, str) for key, label in found.items()):
        raise BadSpec(f"config.json: expected names of classes by number as id2label, found {str(found)[:80]}")
    names = [found[key] for key in sorted(found, key=int)]
    if len(names) == 2 and names[0] == "LABEL_0" and CLASSES not in class_heads(config):
        return {}
    return {"classifier.output_labels": texts(names)}


def class_pooling(config: Config) -> Keys:
    """How a classifier makes one vector of a text's."""
    found = text_config(config, "classifier_pooling")
    if found is None:
        return {}
    if found not in ("cls", "mean"):
        raise BadSpec(f"config.json: llama.cpp pools for a classifier by cls or mean, not by {found!r}")
    return {"classifier.pooling_type": uint32(POOLINGS[found])}


def every_third_full(config: Config) -> Keys:
    """ModernBERT's bases of rotary embeddings, and how often a layer has no window: the first, and each of a turn.

    Raises:
        BadSpec: the layers without a window do not come in turn, or a scaling is said.
    """
    layers, turn = layer_count(config) or 0, text_config(config, "global_attn_every_n_layers")
    kinds = text_config(config, "layer_types")
    if isinstance(kinds, list):
        full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        turn = turn or (full[1] if len(full) > 1 else max(1, layers))
        if full != list(range(0, layers, max(1, turn))):
            raise BadSpec(
                f"config.json: llama.cpp takes every {turn}. layer for one without a window, not {full!s:.80}"
            )
    found: Keys = {} if turn is None else {"attention.sliding_window_pattern": uint32(turn)}
    for key, kind, own in (("freq_base", "full", "global"), ("freq_base_swa", "sliding", "local")):
        rope = rope_of(config, f"{kind}_attention")
        if rope.get("rope_type", "default") != "default":
            raise BadSpec(f"config.json: llama.cpp scales no rotary embeddings of ModernBERT; {rope} is said")
        base = {"rope_theta": text_config(config, f"{own}_rope_theta"), **rope}
        found[f"rope.{key}"] = float32(rope_number(base, "rope_theta"))
    return {**found, "rope.scaling.type": text("none")}


MADE_ENCODERS: dict[str, Callable[[Config], Keys]] = {
    each.__name__: each
    for each in (
        state_heads, step_rank, attention_in_turn, positions_after_padding, class_labels, class_pooling,
        every_third_full,
    )
}  # fmt: skip
