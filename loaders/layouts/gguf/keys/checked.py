"""Keys of windows and experts whose places llama.cpp takes for granted: other places are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loaders.architectures.family import text_config
from loaders.architectures.gguf import number
from loaders.architectures.layer_kinds import layer_count, layer_kinds
from loaders.architectures.rope import rope_number, rope_of
from loaders.containers.gguf import MetadataValue, booleans, float32, text, uint32
from loaders.errors import BadSpec

Config = Mapping[str, Any]
Keys = dict[str, MetadataValue | None]

TURN = 4  # the last of every four layers is another one in OLMo 3, Command R7B, EXAONE 4 and SmolLM3
DEEP = 64  # the layers of the EXAONE 4 to which llama.cpp gives windows
HUNYUAN_SAYS, HUNYUAN_HAS = 2**15, 2**18  # its context as config.json says it, and as it was trained


# --- windows


def windows(config: Config) -> Keys:
    """The window, and which layers have it: all but the last of every four, where config.json says nothing else."""
    tokens, sliding = text_config(config, "sliding_window"), _sliding(config)
    if tokens is None:
        if text_config(config, "layer_types") is not None and any(sliding):
            raise BadSpec("config.json: some layers have a window by layer_types; expected its size as sliding_window")
        return {}
    return {
        "attention.sliding_window": uint32(number(config, "sliding_window")),
        "attention.sliding_window_pattern": booleans(sliding),
    }


def _sliding(config: Config) -> list[bool]:
    """Return for each layer whether it has a window."""
    count = layer_count(config) or 0
    if text_config(config, "layer_types") is not None:
        return [kind == "sliding" for kind in layer_kinds(config)[:count]]
    turn = text_config(config, "sliding_window_pattern")
    turn = TURN if turn is None else turn
    if isinstance(turn, str) and turn and {*turn} <= {"L", "G"}:
        return [turn[layer % len(turn)] == "L" for layer in range(count)]
    if type(turn) is not int or turn < 1:
        raise BadSpec(f"config.json: expected a number or letters L and G as sliding_window_pattern, found {turn!r}")
    return [layer % turn < turn - 1 for layer in range(count)]


def plain_rope_in_windows(config: Config) -> Keys:
    """No key: llama.cpp scales rotary embeddings in OLMo 3's layers of full attention alone, by linear or yarn."""
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
    return {}


def windows_by_depth(config: Config) -> Keys:
    """No key: llama.cpp gives EXAONE 4 windows if it has 64 layers, and leaves layers without one unrotated then."""
    if "sliding_window" not in config:
        raise BadSpec("config.json: expected sliding_window, which is null in an EXAONE 4 without windows")
    has_windows, layers = text_config(config, "sliding_window") is not None, layer_count(config)
    if has_windows != (layers == DEEP):
        raise BadSpec(
            f"config.json: llama.cpp computes EXAONE 4 with windows if it has {DEEP} layers, and without otherwise; it"
            f" has {layers} here, and sliding_window {text_config(config, 'sliding_window')}"
        )
    return {}


def no_windows(config: Config) -> Keys:
    """No key: llama.cpp computes this model type without windows."""
    layers = layer_count(config) or 0
    if text_config(config, "layer_types") is not None:
        sliding = "sliding" in layer_kinds(config)[:layers]
    else:
        first = number(config, "max_window_layers", layers)
        sliding = text_config(config, "sliding_window") is not None and first < layers
    if sliding:
        raise BadSpec("config.json: llama.cpp computes this model type without windows; some layers have one here")
    return {}


# --- rotary embeddings


def every_fourth_unrotated(config: Config) -> Keys:
    """No key: llama.cpp leaves the last of every four layers without rotary embeddings."""
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
    return {}


def unscaled_rope(config: Config) -> Keys:
    """That nothing is scaled, which llama.cpp is told for Command R7B whatever config.json says."""
    kind = rope_of(config).get("rope_type", "default")
    if kind != "default":
        raise BadSpec(f"config.json: llama.cpp's converter writes no rope scaling for this model type; it is {kind!r}")
    return {"rope.scaling.type": text("none")}


def base_by_alpha(config: Config) -> Keys:
    """Hunyuan's scaling, which is called dynamic and is another base: theta * alpha^(size / (size - 2)).

    With it the models were trained on longer texts than config.json says.
    """
    rope = rope_of(config)
    if rope.get("rope_type", "default") != "dynamic":
        return {}
    if not rope.get("alpha"):
        raise BadSpec("config.json: expected alpha in Hunyuan's dynamic rope scaling; llama.cpp knows no other")
    shared = number(config, "hidden_size") // max(1, number(config, "num_attention_heads"))
    size = number(config, "head_dim", shared)
    if size <= 2:
        raise BadSpec(f"config.json: expected a head_dim above 2 for Hunyuan's dynamic rope scaling, found {size}")
    longest, theta = number(config, "max_position_embeddings"), rope_number(rope, "rope_theta", 10000.0)
    return {
        "context_length": uint32(HUNYUAN_HAS if longest == HUNYUAN_SAYS else longest),
        "rope.freq_base": float32(theta * rope_number(rope, "alpha") ** (size / (size - 2))),
        "rope.scaling.type": text("none"),
        "rope.scaling.factor": float32(1.0),
        "rope.scaling.original_context_length": uint32(HUNYUAN_HAS),
    }


# --- heads and experts


def ungrouped_heads(config: Config) -> Keys:
    """No key: llama.cpp loads norms of keys that are as wide as those of queries."""
    heads = number(config, "num_attention_heads")
    if number(config, "num_key_value_heads", heads) != heads:
        found = text_config(config, "num_key_value_heads")
        raise BadSpec(f"config.json: llama.cpp takes as many heads of keys as of queries, {heads}; there are {found}")
    return {}


def experts_to_the_last(config: Config) -> Keys:
    """No key: llama.cpp takes all layers after the first dense ones for mixtures."""
    last, layers = text_config(config, "moe_layer_end_index", -1), layer_count(config) or 0
    if last not in (-1, layers - 1):
        raise BadSpec(
            f"config.json: llama.cpp takes all {layers} layers after the dense ones for mixtures;"
            f" moe_layer_end_index is {last!r}"
        )
    return {}


def shared_experts_width(config: Config) -> Keys:
    """The width of shared experts together."""
    count = number(config, "moe_num_shared_experts", 0)
    width = count * number(config, "moe_intermediate_size")
    return {"expert_shared_feed_forward_length": uint32(width)} if width else {}


def the_same_experts(config: Config) -> Keys:
    """Hunyuan's experts, of which config.json may say in a list what each layer has."""
    width, chosen, shared = (_one(config, key) for key in ("moe_intermediate_size", "moe_topk", "num_shared_expert"))
    _one(config, "num_experts")
    if width != number(config, "intermediate_size"):
        raise BadSpec(
            f"config.json: llama.cpp loads Hunyuan's experts with the width intermediate_size,"
            f" {number(config, 'intermediate_size')}; moe_intermediate_size is {width}"
        )
    return {
        "expert_feed_forward_length": uint32(width),
        "expert_used_count": uint32(chosen),
        "expert_shared_count": uint32(shared),
    }


def _one(config: Config, key: str) -> int:
    """Return a number that config.json has for all layers, or in a list for each of them."""
    found = text_config(config, key)
    first = found[0] if isinstance(found, list) and found else found
    if isinstance(found, list) and any(each != first for each in found):
        raise BadSpec(f"config.json: llama.cpp takes one {key} for all layers, found {str(found)[:80]}")
    return number({key: first}, key)


MADE_CHECKED: dict[str, Callable[[Config], Keys]] = {
    each.__name__: each
    for each in (
        windows, plain_rope_in_windows, windows_by_depth, no_windows, every_fourth_unrotated, unscaled_rope,
        base_by_alpha, ungrouped_heads, experts_to_the_last, shared_experts_width, the_same_experts,
    )
}  # fmt: skip
