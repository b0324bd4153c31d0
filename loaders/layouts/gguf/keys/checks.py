"""Checks of config.json against what llama.cpp takes for granted, as words of a family's table.

Each says what llama.cpp computes, and raises BadSpec where the model is computed otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from loaders.architectures.family import text_config
from loaders.architectures.gguf import number
from loaders.architectures.layer_kinds import layer_count, layer_kinds
from loaders.architectures.rope import rope_of
from loaders.errors import BadSpec
from loaders.layouts.gguf.keys.architecture import head_size
from loaders.layouts.gguf.keys.encoders import CLASSES, class_heads

Config = Mapping[str, Any]

GEMMA_27B = (46, 62)  # the layers of Gemma 2's and Gemma 3's
TURN = 4  # the last of every four layers is another one in EXAONE 4, SmolLM3 and Llama 4
DEEP = 64  # the layers of the EXAONE 4 to which llama.cpp gives windows
SCALED = 128  # experts of the Llama 4 whose queries and keys have no norms: Maverick
HEADS = (CLASSES, "MaskedLM", "PreTraining")  # the last two are left out


# --- attention


def usual_heads(config: Config) -> None:
    """llama.cpp takes heads that share hidden_size."""
    shared = number(config, "hidden_size") // max(1, number(config, "num_attention_heads"))
    if head_size(config) != shared:
        raise BadSpec(f"config.json: llama.cpp takes hidden_size / heads, {shared}, for head_dim {head_size(config)}")


def ungrouped_heads(config: Config) -> None:
    """llama.cpp loads norms of keys that are as wide as those of queries."""
    heads = number(config, "num_attention_heads")
    if number(config, "num_key_value_heads", heads) != heads:
        found = text_config(config, "num_key_value_heads")
        raise BadSpec(f"config.json: llama.cpp takes as many heads of keys as of queries, {heads}; there are {found}")


def usual_attention_scale(config: Config) -> None:
    """llama.cpp scales by the size of a head, in Gemma's 27B models by that of an equal share."""
    size = head_size(config)
    if number(config, "num_hidden_layers") in GEMMA_27B:
        size = number(config, "hidden_size") // max(1, number(config, "num_attention_heads"))
    found = text_config(config, "query_pre_attn_scalar")
    if found != size:
        raise BadSpec(
            f"config.json: llama.cpp scales attention as for query_pre_attn_scalar {size}; it is {found} here"
        )


# --- windows


def no_windows(config: Config) -> None:
    """llama.cpp computes this model type without windows."""
    layers = layer_count(config) or 0
    if text_config(config, "layer_types") is not None:
        sliding = "sliding" in layer_kinds(config)[:layers]
    else:
        first = number(config, "max_window_layers", layers)
        sliding = text_config(config, "sliding_window") is not None and first < layers
    if sliding:
        raise BadSpec("config.json: llama.cpp computes this model type without windows; some layers have one here")


def windows_by_depth(config: Config) -> None:
    """llama.cpp gives EXAONE 4 windows if it has 64 layers, and leaves layers without one unrotated then."""
    if "sliding_window" not in config:
        raise BadSpec("config.json: expected sliding_window, which is null in an EXAONE 4 without windows")
    has_windows, layers = text_config(config, "sliding_window") is not None, layer_count(config)
    if has_windows != (layers == DEEP):
        raise BadSpec(
            f"config.json: llama.cpp computes EXAONE 4 with windows if it has {DEEP} layers, and without otherwise; it"
            f" has {layers} here, and sliding_window {text_config(config, 'sliding_window')}"
        )


def usual_chunks(config: Config) -> None:
    """llama.cpp knows which layers attend within chunks, which rotate, and which norm queries and keys.

    Raises:
        BadSpec: the model's are others.
    """
    layers = layer_count(config) or 0
    whole = [layer % TURN == TURN - 1 for layer in range(layers)]
    step = max(1, number(config, "interleave_moe_layer_step", 1))
    experts = number(config, "num_local_experts", 16)
    if experts < 1:
        raise BadSpec("config.json: llama.cpp loads no Llama 4 without experts; num_local_experts is 0")
    rows = (
        ("layer_types", ["full_attention" if each else "chunked_attention" for each in whole], "attends within chunks"),
        ("no_rope_layers", [int(not each) for each in whole], "rotates queries and keys"),
        ("moe_layers", list(range(step - 1, layers, step)), "has experts"),
    )
    for key, wanted, what in rows:
        found = text_config(config, key)
        if found and found != wanted:
            raise BadSpec(f"config.json: llama.cpp {what} in other layers than {key} says: expected {wanted!s:.120}")
    if bool(text_config(config, "use_qk_norm", True)) == (experts == SCALED):
        raise BadSpec(
            f"config.json: llama.cpp norms queries and keys unless a Llama 4 has {SCALED} experts; use_qk_norm is"
            f" {text_config(config, 'use_qk_norm', True)} with {experts} here"
        )
    if not text_config(config, "attn_temperature_tuning", True):
        raise BadSpec("config.json: llama.cpp scales attention in long texts; attn_temperature_tuning is off here")


# --- rotary embeddings


def plain_rope_in_windows(config: Config) -> None:
    """llama.cpp scales rotary embeddings in OLMo 3's layers of full attention alone, by linear or yarn."""
    block = text_config(config, "rope_parameters")
    within = block.get("sliding_attention") if isinstance(block, Mapping) else None  # the old style's is never scaled
    kinds = {
        "sliding_attention": rope_of({"rope_parameters": within or {}}).get("rope_type", "default"),
        "full_attention": rope_of(config, "full_attention").get("rope_type", "default"),
    }
    for layers, known in (("sliding_attention", ("default",)), ("full_attention", ("default", "linear", "yarn"))):
        if kinds[layers] not in known:
            wanted = " or ".join(known)
            raise BadSpec(f"config.json: llama.cpp computes {layers} with {wanted} as rope_type, not {kinds[layers]!r}")


def every_fourth_unrotated(config: Config) -> None:
    """llama.cpp leaves the last of every four layers without rotary embeddings."""
    layers = layer_count(config) or 0
    usual = [int(layer % TURN < TURN - 1) for layer in range(layers)]
    every, found = text_config(config, "no_rope_layer_interval", TURN), text_config(config, "no_rope_layers")
    if found is None and type(every) is int and every > 0:
        found = [int(layer % every < every - 1) for layer in range(layers)]
    if found != usual:
        raise BadSpec(
            f"config.json: llama.cpp leaves every {TURN}th layer unrotated, and only these; no_rope_layers is"
            f" {str(found)[:80]}"
        )


# --- experts


def usual_groups(config: Config) -> None:
    """llama.cpp chooses groups of experts by the sum of each group's two best, as DeepSeek V3 does.

    Raises:
        BadSpec: they are chosen by the best alone, as the large DeepSeek V2 does.
    """
    if number(config, "n_group", 1) > 1 and text_config(config, "topk_method") == "group_limited_greedy":
        raise BadSpec(
            "config.json: llama.cpp chooses groups of experts by the sum of their two best; by topk_method"
            " group_limited_greedy the best one alone counts"
        )


def experts_to_the_last(config: Config) -> None:
    """llama.cpp takes all layers after the first dense ones for mixtures."""
    last, layers = text_config(config, "moe_layer_end_index", -1), layer_count(config) or 0
    if last not in (-1, layers - 1):
        raise BadSpec(
            f"config.json: llama.cpp takes all {layers} layers after the dense ones for mixtures;"
            f" moe_layer_end_index is {last!r}"
        )


# --- state spaces


def unclamped_steps(config: Config) -> None:
    """llama.cpp keeps time steps within no limits."""
    found = text_config(config, "time_step_limit")
    if found is None:
        return
    # transformers writes infinity as {"__float__": "Infinity"}.
    limits = [each.get("__float__") if isinstance(each, Mapping) else each for each in found]
    if len(limits) != 2 or limits[0] != 0 or limits[1] not in (math.inf, "Infinity"):
        raise BadSpec(f"config.json: llama.cpp keeps time steps within no limits; time_step_limit is {limits} here")


def norm_after_gate(config: Config) -> None:
    """llama.cpp norms a state space's output after the gate."""
    if text_config(config, "mamba_rms_norm", False) and text_config(config, "mamba_norm_before_gate", True):
        raise BadSpec("config.json: llama.cpp norms after the gate of Mamba 2; mamba_norm_before_gate is true here")


# --- embeddings and heads


def one_embedding(config: Config) -> None:
    """A tied embedding cannot have two multipliers."""
    inner, outer = (text_config(config, f"{key}_multiplier", 1) for key in ("embedding", "lm_head"))
    if text_config(config, "tie_word_embeddings", False) and inner != outer:
        raise BadSpec(
            "config.json: llama.cpp has multipliers in the weights, and one embedding cannot have two:"
            f" embedding_multiplier is {inner}, lm_head_multiplier {outer}"
        )


def heads_of_texts(config: Config) -> None:
    """llama.cpp computes embeddings, and classes of whole texts."""
    for head in class_heads(config):
        if head not in HEADS:
            raise BadSpec(f"config.json: llama.cpp computes embeddings and classes of texts, and no {head}")


def no_classes(config: Config) -> None:
    """llama.cpp computes BERT's classes without the pooler before them."""
    if CLASSES in class_heads(config):
        raise BadSpec("config.json: llama.cpp computes BERT's classifier without the pooler that is before it")


CHECKS: dict[str, Callable[[Config], None]] = {
    each.__name__: each
    for each in (
        usual_heads, ungrouped_heads, usual_attention_scale, no_windows, windows_by_depth, usual_chunks,
        plain_rope_in_windows, every_fourth_unrotated, usual_groups, experts_to_the_last, unclamped_steps,
        norm_after_gate, one_embedding, heads_of_texts, no_classes,
    )
}  # fmt: skip
