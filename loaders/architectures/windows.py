"""Sliding windows: which layers of a model attend to the last tokens only, as transformers 5 reads config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loaders.architectures.family import text_config

# models that have a window unless sliding_window is null
EVERY_LAYER = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")
BY_SWITCH = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")  # models that have one only if use_sliding_window is set
DEFAULTS = {"mistral": 4096, **dict.fromkeys(BY_SWITCH, 4096)}  # where config.json has no such key


@dataclass(frozen=True, slots=True)
class Window:
    """A number of tokens, and for each layer whether it has the window; None if all have."""

    tokens: int
    layers: tuple[bool, ...] | None = None


def window_of(config: Mapping[str, Any]) -> Window | None:
    """Return the sliding window of a model of these types; None if it has none."""
    model_type = str(config.get("model_type"))
    is_switched_on = model_type in BY_SWITCH and text_config(config, "use_sliding_window") is True
    if model_type not in EVERY_LAYER and not is_switched_on:
        return None
    tokens = text_config(config, "sliding_window", DEFAULTS.get(model_type))
    if type(tokens) is not int or tokens < 1:
        return None
    if model_type in ("qwen2", "qwen3"):
        layers = _layers(config)
        return None if not any(layers) else Window(tokens, None if all(layers) else layers)
    return Window(tokens)


def _layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    count, kinds = text_config(config, "num_hidden_layers"), text_config(config, "layer_types")
    if isinstance(kinds, list):
        return tuple(kind == "sliding_attention" for kind in kinds)
    first = text_config(config, "max_window_layers", 28)
    is_known = type(count) is int and type(first) is int and count < 1 << 16
    return tuple(layer >= first for layer in range(count)) if is_known else ()


def said_window(config: Mapping[str, Any]) -> int | None:
    """Return the tokens of a window that config.json says for some layer of a model of another type.

    What its class makes of that is not known here. None where no text exceeds the window.
    """
    tokens, kinds = text_config(config, "sliding_window"), text_config(config, "layer_types")
    is_off = text_config(config, "use_sliding_window") is False
    if config.get("model_type") in (*EVERY_LAYER, *BY_SWITCH) or type(tokens) is not int or tokens < 1 or is_off:
        return None
    has_none = "sliding_attention" not in kinds if isinstance(kinds, list) else _is_after_the_last(config)
    return None if has_none or _covers_all(tokens, config) else tokens


def _is_after_the_last(config: Mapping[str, Any]) -> bool:
    """Whether windows begin with a layer that is not there."""
    first, count = text_config(config, "max_window_layers"), text_config(config, "num_hidden_layers")
    return type(first) is int and type(count) is int and first >= count


def _covers_all(tokens: int, config: Mapping[str, Any]) -> bool:
    """Whether no text exceeds a window."""
    longest = text_config(config, "max_position_embeddings")
    return type(longest) is int and longest <= tokens


def ignored_window(config: Mapping[str, Any], engine: str) -> list[str]:
    """Warn that an engine computes a model without its window, if it has one that any text can exceed."""
    found = window_of(config)
    if found is None or _covers_all(found.tokens, config):
        return []
    return [
        f"{engine} computes {config.get('model_type')} without its sliding window: texts of more than {found.tokens}"
        " tokens come out otherwise than in transformers"
    ]
