"""Keys of metadata that differ from layer to layer, those of hybrids and of experts, as words of a family's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loaders.architectures.family import text_config
from loaders.architectures.gguf import number
from loaders.architectures.layer_kinds import layer_count, layer_kinds
from loaders.architectures.rope import rope_of
from loaders.containers.gguf import MetadataValue, boolean, booleans, float32, float32s, int32s, uint32
from loaders.errors import BadSpec

Config = Mapping[str, Any]
Keys = dict[str, MetadataValue | None]

TURN = 4  # layers of OLMo 3, Command R7B and EXAONE 4, of which the last has no window
CONTEXT = 2**20  # what the converter writes for models whose attention knows no positions


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


# --- hybrids of attention with something else


def attention_layers(config: Config) -> Keys:
    """Heads of keys and values for each layer: none where it is not one of attention."""
    heads = number(config, "num_key_value_heads", number(config, "num_attention_heads"))
    kinds = _kinds(config)
    return {"attention.head_count_kv": int32s([heads if kind == "attention" else 0 for kind in kinds])}


def mlp_layers(config: Config) -> Keys:
    """The width of each layer's MLP or of its experts: none where it has neither."""
    widths = {"mlp": number(config, "intermediate_size"), "moe": number(config, "moe_intermediate_size", 0)}
    return {"feed_forward_length": int32s([widths.get(kind, 0) for kind in _kinds(config)])}


def inner_size(config: Config) -> Keys:
    """The width of a state space's channels, which are heads of a size."""
    for heads, size in (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim")):
        if text_config(config, heads) is not None and type(text_config(config, size)) is int:
            return {"ssm.inner_size": uint32(number(config, heads) * number(config, size))}
    expand = number(config, "mamba_expand", number(config, "expand", 2))
    return {"ssm.inner_size": uint32(expand * number(config, "hidden_size"))}


def hybrid_positions(config: Config) -> Keys:
    """Whether attention has rotary embeddings: not beside state spaces, unless config.json says so."""
    rotates = "recurrent" not in _kinds(config) or text_config(config, "position_embedding_type") == "rope"
    found: Keys = {
        "rope.scaling.finetuned": boolean(rotates),
        "rope.dimension_count": uint32(number(config, "hidden_size") // max(1, number(config, "num_attention_heads"))),
    }
    if rotates:
        return found
    base = {} if rope_of(config).get("rope_theta") is not None else {"rope.freq_base": None}
    return {**found, "context_length": uint32(CONTEXT), **base}


def adjusted_feed_forward(config: Config) -> Keys:
    """The width of LFM2's MLP, which its class works out of the one that config.json says."""
    width = number(config, "block_ff_dim", number(config, "intermediate_size", 0))
    if text_config(config, "block_auto_adjust_ff_dim", True):
        width, factor = int(2 * width / 3), text_config(config, "block_ffn_dim_multiplier", 1.0)
        multiple = max(1, number(config, "block_multiple_of", 256))
        width = int(factor * width) if isinstance(factor, int | float) else width
        width = multiple * -(-width // multiple)
    return {"feed_forward_length": uint32(width)}


def _kinds(config: Config) -> tuple[str, ...]:
    found, count = layer_kinds(config), layer_count(config) or 0
    if len(found) < count:
        raise BadSpec(f"config.json: expected the kinds of {count} layers, found none")
    return found[:count]


# --- sparse attention and experts


def sparse_indexer(config: Config) -> Keys:
    """MiniMax's indexer of blocks, under either of its names, and the dense layers before the mixtures."""
    sparse = text_config(config, "sparse_attention_config")
    said = sparse if isinstance(sparse, Mapping) else {}
    rows = (
        ("head_count", "sparse_num_index_heads", "index_n_heads"), ("key_length", "sparse_index_dim", "index_head_dim"),
        ("top_k", "sparse_topk_blocks", "index_topk_blocks"), ("block_size", "sparse_block_size", "index_block_size"),
        ("local_blocks", "sparse_local_block", "index_local_blocks"),
    )  # fmt: skip
    found: Keys = {}
    for key, published, own in rows:
        value = said.get(published, text_config(config, own))
        if type(value) is not int or value < 0:
            raise BadSpec(f"config.json: expected a whole number as {published} or {own}, found {value!r}")
        found[f"attention.indexer.{key}"] = uint32(value)
    kinds, mixtures = text_config(config, "mlp_layer_types"), text_config(config, "moe_layer_freq")
    is_dense = [kind == "dense" for kind in kinds] if isinstance(kinds, list) else []
    is_dense = [each == 0 for each in mixtures] if isinstance(mixtures, list) else is_dense
    return found | {"leading_dense_block_count": uint32((*is_dense, False).index(False))}


def first_moe_layer(config: Config) -> Keys:
    """The number of dense layers before the first mixture, from a text that lists the mixtures."""
    listed = text_config(config, "moe_layers_enum")
    found = [int(each) for each in listed.split(",") if each.strip().isdecimal()] if isinstance(listed, str) else []
    return {"leading_dense_block_count": uint32(min(found, default=0))}


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


# --- values for each of the file's layers, those for multi-token prediction included


def step_layers(config: Config) -> Keys:
    """Step's heads, windows, bases of rotary embeddings and limits, which depend on the kind of a layer.

    Raises:
        BadSpec: layers rotate other parts of a head than llama.cpp does: a half, or all of it in a window.
    """
    blocks = number(config, "block_count")
    kinds = _list(config, "layer_types", blocks, "full_attention")
    rotated = _list(config, "partial_rotary_factors", blocks, 0.5)
    if rotated != [1.0 if kind == "sliding_attention" else 0.5 for kind in kinds]:
        raise BadSpec("config.json: llama.cpp rotates half a head, and all in a window; partial_rotary_factors differ")
    scaling = text_config(config, "rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) not in (None, "default"):
        raise BadSpec(f"config.json: Step's rope scaling {str(scaling)[:80]} is not converted to GGUF here")
    bases = _list(config, "rope_theta", blocks, 10000.0)
    is_one_a_kind = len({*zip(map(str, bases), kinds, strict=True)}) == len({*kinds})
    if not is_one_a_kind or not all(isinstance(base, int | float) for base in bases):
        raise BadSpec(f"config.json: expected one rope_theta for each kind of layers, found {str(bases)[:80]}")
    other = text_config(config, "attention_other_setting")
    within = other if isinstance(other, Mapping) else {}
    heads, groups = number(config, "num_attention_heads"), number(config, "num_attention_groups")
    is_sliding = [kind == "sliding_attention" for kind in kinds]
    found: Keys = {
        "attention.head_count": int32s(_by(is_sliding, within.get("num_attention_heads", heads), heads)),
        "attention.head_count_kv": int32s(_by(is_sliding, within.get("num_attention_groups", groups), groups)),
        "attention.sliding_window_pattern": booleans(is_sliding),
    }
    within_base = next((base for base, sliding in zip(bases, is_sliding, strict=False) if sliding), bases[0])
    outside = next((base for base, sliding in zip(bases, is_sliding, strict=False) if not sliding), bases[0])
    found |= {"rope.freq_base": float32(float(outside)), "rope.freq_base_swa": float32(float(within_base))}
    for key, name in (("swiglu_clamp_exp", "swiglu_limits"), ("swiglu_clamp_shexp", "swiglu_limits_shared")):
        if text_config(config, name) is not None:
            limits = _list(config, name, blocks, 0.0)
            found[key] = float32s([0.0 if limit is None else float(limit) for limit in limits])
    return found


def mimo_layers(config: Config) -> Keys:
    """MiMo's key-value heads and windows; its layers for multi-token prediction have a window.

    Raises:
        BadSpec: heads differ in size or number between the two kinds of layers.
    """
    for name in ("head_dim", "num_attention_heads", "v_head_dim"):
        if text_config(config, f"swa_{name}", text_config(config, name)) != text_config(config, name):
            raise BadSpec(f"config.json: llama.cpp takes {name} for all layers; swa_{name} is another")
    said = text_config(config, "hybrid_layer_pattern")
    if said is None:
        said = [int(kind == "sliding_attention") for kind in text_config(config, "layer_types", [])]
    if not isinstance(said, list) or not {0, 1}.issuperset(said):
        raise BadSpec(f"config.json: expected a list of 0 and 1 as hybrid_layer_pattern, found {said!r}")
    pattern = [*said, *[1] * max(0, number(config, "block_count") - len(said))]
    every = number(config, "num_key_value_heads")
    within = number(config, "swa_num_key_value_heads", every)
    base = text_config(config, "swa_rope_theta")
    return {
        "attention.head_count_kv": int32s(_by([each == 1 for each in pattern], within, every)),
        "attention.sliding_window_pattern": int32s(pattern),
        **({} if base is None else {"rope.freq_base_swa": float32(float(base))}),
    }


def _list(config: Config, key: str, count: int, default: Any) -> list[Any]:
    """Return a list of config.json with an entry for each layer, filled up with a default."""
    found = text_config(config, key)
    if found is not None and not isinstance(found, list):
        raise BadSpec(f"config.json: expected a list as {key}, found {found!r}")
    return [*(found or ()), *[default] * count][:count]


def _by(chosen: Sequence[bool], one: int, other: int) -> list[int]:
    return [one if each else other for each in chosen]


MADE_BY_LAYER: dict[str, Callable[[Config], Keys]] = {
    each.__name__: each
    for each in (
        windows, attention_layers, mlp_layers, inner_size, hybrid_positions, adjusted_feed_forward, sparse_indexer,
        first_moe_layer, shared_experts_width, the_same_experts, step_layers, mimo_layers,
    )
}  # fmt: skip
