"""The kinds of a hybrid model's layers, from the many words that config.json has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loaders.architectures.family import text_config
from loaders.errors import BadSpec

Config = Mapping[str, Any]

KEYS = ("hybrid_override_pattern", "layers_block_type", "layer_types")
# Nemotron's letters, the words of published files, and those that transformers 5 has made of these
KINDS = {
    "M": "recurrent", "mamba": "recurrent", "linear_attention": "recurrent", "*": "attention", "attention": "attention",
    "full_attention": "attention", "sliding_attention": "sliding", "conv": "convolution", "-": "mlp", "mlp": "mlp",
    "E": "moe", "moe": "moe",
}  # fmt: skip


def layer_kinds(config: Config) -> tuple[str, ...]:
    """Return the kind of each layer: recurrent, attention, sliding, convolution, mlp or moe; nothing if none is said.

    Raises:
        BadSpec: a word for a kind is not known, or there are fewer than layers.
    """
    count, indices = text_config(config, "num_hidden_layers"), text_config(config, "full_attn_idxs")
    found = next((found for key in KEYS if (found := text_config(config, key))), None)
    if found is None and isinstance(indices, list) and isinstance(count, int):
        return tuple("attention" if number in indices else "convolution" for number in range(count))
    if found is None:
        return ()
    if not isinstance(found, str | list | tuple) or not all(isinstance(kind, str) and kind in KINDS for kind in found):
        raise BadSpec(f"config.json: expected {', '.join(KINDS)} as kinds of layers, found {str(found)[:80]!r}")
    if isinstance(count, int) and len(found) < count:
        raise BadSpec(f"config.json: num_hidden_layers is {count}, and the kinds of {len(found)} layers are said")
    return tuple(KINDS[kind] for kind in found)


def layer_count(config: Config) -> int | None:
    """Return the number of layers, which some models say only by the kinds of their layers."""
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        found = text_config(config, key)
        if found is not None:
            return found if type(found) is int and found >= 0 else None
    return len(layer_kinds(config)) or None


# --- conditions under which an engine holds a model type in another way: see `variants` in `gguf.Architecture`


def all_attention(config: Config) -> bool:
    """Every layer is one of attention: a hybrid in name only."""
    return {*layer_kinds(config)} == {"attention"}


def without_experts(config: Config) -> bool:
    """No layer is a mixture."""
    kinds = layer_kinds(config)
    return "moe" not in kinds if {"mlp", "moe"} & {*kinds} else not text_config(config, "num_local_experts")


def tied(config: Config) -> bool:
    """config.json says that the head is the embedding."""
    return text_config(config, "tie_word_embeddings") is True


CONDITIONS: dict[str, Callable[[Config], bool]] = {
    each.__name__: each for each in (all_attention, without_experts, tied)
}
