"""Which linear layers of a plain model have a bias, as transformers' classes make them (5.23, models/*/modeling_*.py).

Some quantizers give every layer a bias, of zeros, which engines then find too many.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loaders.architectures.family import text_config

ATTENTION, MLP = r"\.self_attn\.[qkvo]_proj$", r"\.mlp\.(?:gate|up|down)_proj$"


@dataclass(frozen=True, slots=True)
class Biases:
    """The modules with a bias: those of `always`, and those of `by_setting` where config.json's key is true."""

    model_types: tuple[str, ...]
    always: str | None = None
    by_setting: tuple[tuple[str, str], ...] = ()


ROWS = (
    Biases(("llama",), by_setting=(("attention_bias", ATTENTION), ("mlp_bias", MLP))),
    Biases(("qwen2", "qwen2_moe"), always=r"\.self_attn\.[qkv]_proj$"),
    Biases(("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"), by_setting=(("attention_bias", ATTENTION),)),
    Biases(("mistral", "mixtral", "phi3")),
    Biases(("qwen",), always=r"\.attn\.c_attn$"),  # Qwen's own class, by its names; published models say no_bias
)


def has_bias(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether the plain model has a bias in this linear layer; None if its model_type is not in the table."""
    row = next((row for row in ROWS if config.get("model_type") in row.model_types), None)
    if row is None or (config.get("model_type") == "qwen" and config.get("no_bias") is not True):
        return None
    patterns = [pattern for key, pattern in row.by_setting if text_config(config, key, False)]
    patterns += [row.always] if row.always is not None else []
    return any(re.search(pattern, module) for pattern in patterns)
