"""Keys of metadata of latent attention and of scalings of rotary embeddings, as words of a family's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loaders.architectures.family import text_config
from loaders.architectures.gguf import number
from loaders.architectures.rope import rope_number, rope_of
from loaders.containers.gguf import MetadataValue, booleans, float32, float32s, int32s, text, uint32
from loaders.errors import BadSpec

Config = Mapping[str, Any]
Keys = dict[str, MetadataValue | None]

# Yarn's factor of the embeddings, which architectures with a multiplier of their own work out by themselves.
NO_ATTENTION_FACTOR: Keys = {"rope.scaling.yarn_attn_factor": None, "rope.scaling.attn_factor": None}
HUNYUAN_SAYS, HUNYUAN_HAS = 2**15, 2**18  # its context as config.json says it, and as it was trained


def latent_sizes(config: Config) -> Keys:
    """Latent attention: the sizes of its one wide head, and those of the heads that this is cut into."""
    rank, rotated = number(config, "kv_lora_rank", 512), number(config, "qk_rope_head_dim")
    return {
        "attention.key_length": uint32(rank + rotated),
        "attention.value_length": uint32(rank),
        "attention.key_length_mla": uint32(number(config, "qk_nope_head_dim") + rotated),
        "attention.value_length_mla": uint32(number(config, "v_head_dim")),
    }


def latent_yarn(config: Config) -> Keys:
    """Yarn's mscale_all_dim, a tenth of which this architecture reads; it takes mscale for the same.

    Raises:
        BadSpec: mscale is another number.
    """
    rope = rope_of(config)
    if rope.get("mscale_all_dim") is None:
        return {}
    scale = rope_number(rope, "mscale_all_dim")
    if rope.get("mscale") not in (None, scale):
        raise BadSpec(f"config.json: llama.cpp takes yarn's mscale for mscale_all_dim, {scale}; it is {rope['mscale']}")
    found: Keys = {"rope.scaling.yarn_log_multiplier": float32(0.1 * scale)}
    return found if rope.get("attention_factor") is not None else found | NO_ATTENTION_FACTOR


def mistral_yarn(config: Config) -> Keys:
    """Yarn's mscale_all_dim as it is, and the scale of the queries at long distances, where a model has it."""
    rope = rope_of(config)
    if rope.get("llama_4_scaling_beta") is None:
        return {}
    return {
        "rope.scaling.yarn_log_multiplier": float32(rope_number(rope, "mscale_all_dim")),
        "attention.temperature_scale": float32(rope_number(rope, "llama_4_scaling_beta")),
        **({} if rope.get("attention_factor") is not None else NO_ATTENTION_FACTOR),
    }


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


def indexer_types(config: Config) -> Keys:
    """Whether each layer has an indexer of its own, or takes the choice of the one before."""
    kinds = text_config(config, "indexer_types")
    if kinds is None:
        return {}
    if not isinstance(kinds, list) or not {"full", "shared"}.issuperset(kinds):
        raise BadSpec(f"config.json: expected a list of full and shared as indexer_types, found {kinds!r}")
    return {"attention.indexer.types": booleans([kind == "full" for kind in kinds])}


def compressed_attention(config: Config) -> Keys:
    """DeepSeek V4's ratios of compression, the limits of its MLPs, and the width of its hyper-connections."""
    ratios, layers = text_config(config, "compress_ratios"), number(config, "num_hidden_layers")
    if not isinstance(ratios, list) or not all(type(ratio) is int and 0 <= ratio < 1 << 31 for ratio in ratios):
        raise BadSpec(f"config.json: expected a list of whole numbers as compress_ratios, found {str(ratios)[:80]}")
    limits = float32s([rope_number(config, "swiglu_limit")] * layers)
    return {
        "attention.compress_ratios": int32s(ratios),
        "swiglu_clamp_exp": limits,
        "swiglu_clamp_shexp": limits,
        "embedding_length_out": uint32(number(config, "hidden_size") * number(config, "hc_mult")),
    }


MADE_LATENT: dict[str, Callable[[Config], Keys]] = {
    each.__name__: each
    for each in (
        latent_sizes, latent_yarn, mistral_yarn, unscaled_rope, base_by_alpha, indexer_types, compressed_attention,
    )
}  # fmt: skip
