"""What mlx-lm calls the tensors and the settings of a model, where it differs from transformers.

Facts from mlx_lm 0.32 (models/*.py, ModelArgs and sanitize). Names are the same but for the experts of a mixture, which
mlx-lm stacks: an expert's matrix is one of E along the first dimension of MODULE.switch_mlp.gate_proj and so on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loaders.specs import DTYPES, DType

CAST_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class MlxModel:
    """A model_type that mlx-lm and we know.

    experts: the module that holds them and their three matrices' names, by those in the stack. has_head_dim: whether a
    head_dim other than hidden_size / num_attention_heads can be told. needs: settings without a default, which older
    configs leave to transformers.
    """

    experts: tuple[str, Mapping[str, str]] | None = None
    num_experts: str = ""
    has_head_dim: bool = False
    router_bits: int | None = None  # of affine groups of 64; None: as everything else
    needs: Mapping[str, Any] = field(default_factory=dict)


QWEN_EXPERTS = ("mlp", {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"})
MIXTRAL_EXPERTS = ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
MODELS = {
    "llama": MlxModel(has_head_dim=True),
    "mistral": MlxModel(has_head_dim=True),
    "mixtral": MlxModel(MIXTRAL_EXPERTS, "num_local_experts"),
    "qwen2": MlxModel(),
    "qwen3": MlxModel(has_head_dim=True),
    "qwen3_moe": MlxModel(
        QWEN_EXPERTS,
        "num_experts",
        has_head_dim=True,
        router_bits=8,
        needs={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False},
    ),
}
ROUTER_GROUP = 64
LAYER = r"model\.layers\.\d+"


def model_of(config: Mapping[str, Any]) -> MlxModel | None:
    """What is known of a config's model_type."""
    return MODELS.get(str(config.get("model_type")))


def convert_dtype(config: Mapping[str, Any]) -> DType | None:
    """The dtype that mlx_lm.convert gives all float weights first; None: each keeps its own.

    It reads `torch_dtype` alone, or the `dtype` of a text_config: not the `dtype` that transformers 5 writes.
    """
    text = config.get("text_config")
    name = config.get("torch_dtype") or (text.get("dtype") if isinstance(text, Mapping) else None)
    return DTYPES[CAST_DTYPES[name]] if isinstance(name, str) and name in CAST_DTYPES else None


# --- names


def stack_of(model: MlxModel, name: str) -> tuple[str, int] | None:
    """The stacked weight that an expert's is part of, and which part."""
    if model.experts is None:
        return None
    module, matrices = model.experts
    own = {hf: mlx for mlx, hf in matrices.items()}
    match = re.fullmatch(rf"({LAYER}\.{module})\.experts\.(\d+)\.({'|'.join(own)})\.weight", name)
    return (f"{match[1]}.switch_mlp.{own[match[3]]}.weight", int(match[2])) if match else None


def expert_names(model: MlxModel, stacked: str, count: int) -> tuple[str, ...] | None:
    """The experts in a stacked weight by transformers' names, in order."""
    if model.experts is None:
        return None
    module, matrices = model.experts
    match = re.fullmatch(rf"({LAYER}\.{module})\.switch_mlp\.({'|'.join(matrices)})\.weight", stacked)
    return tuple(f"{match[1]}.experts.{e}.{matrices[match[2]]}.weight" for e in range(count)) if match else None


# --- settings


def num_experts(model: MlxModel, config: Mapping[str, Any]) -> int | None:
    """How many experts a layer has, by whichever name the config has it."""
    found = config.get("num_experts", config.get("num_local_experts"))
    return found if model.experts is not None and isinstance(found, int) else None


def fault(model: MlxModel, config: Mapping[str, Any]) -> str | None:
    """What mlx-lm could not be told of a config, or None."""
    head_dim, usual = config.get("head_dim"), _usual_head_dim(config)
    if not model.has_head_dim and head_dim not in (None, usual):
        return (
            f"config.json: head_dim is {head_dim}, but mlx-lm's {config['model_type']} takes hidden_size /"
            f" num_attention_heads, {usual}: it could not load these weights; use another engine's quant"
        )
    if model.experts is not None and num_experts(model, config) is None:
        return f"config.json: expected {model.num_experts}, which {config['model_type']} needs, found none"
    return None


def _usual_head_dim(config: Mapping[str, Any]) -> int | None:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def translate_config(model: MlxModel, config: Mapping[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """config.json as mlx-lm reads it; transformers reads it too.

    transformers 5 keeps rope_theta and the scaling in rope_parameters and calls num_experts num_local_experts: mlx-lm
    reads the older places, and without them takes its own defaults without a word. An absent tie_word_embeddings means
    true to mlx-lm and false to transformers: it is always written.
    """
    made = {key: value for key, value in config.items() if key != "_name_or_path"}
    made["tie_word_embeddings"] = is_tied
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping):
        if config.get("rope_theta") is None and "rope_theta" in rope:
            made["rope_theta"] = rope["rope_theta"]
        kind = rope.get("rope_type", rope.get("type", "default"))
        if config.get("rope_scaling") is None and kind != "default":
            made["rope_scaling"] = dict(rope)
    if config.get("num_key_value_heads") is None and "num_attention_heads" in config:
        made["num_key_value_heads"] = config["num_attention_heads"]
    if config.get("head_dim") is None and _usual_head_dim(config) is not None:
        made["head_dim"] = _usual_head_dim(config)
    if model.experts is not None:
        made[model.num_experts] = num_experts(model, config)
    return made | {key: value for key, value in model.needs.items() if config.get(key) is None}


# --- the packed container's experts, which bear mlx-lm's names of matrices


def packed_experts(config: Mapping[str, Any]) -> tuple[str, Mapping[str, str]]:
    """The module that holds the experts, and their matrices' own names by mlx-lm's; of unknown models, the usual."""
    model = model_of(config)
    return QWEN_EXPERTS if model is None or model.experts is None else model.experts


def packed_expert_name(config: Mapping[str, Any], layer: int, expert: int, component: str) -> str:
    """An expert's tensor by its own name: component is such as "gate_proj.weight"."""
    module, matrices = packed_experts(config)
    matrix, _, suffix = component.partition(".")
    return f"model.layers.{layer}.{module}.experts.{expert}.{matrices[matrix]}.{suffix}"


def packed_expert(config: Mapping[str, Any], name: str) -> tuple[int, int, str] | None:
    """Layer, expert and component of an expert's tensor; None for any other."""
    module, matrices = packed_experts(config)
    own = {hf: mlx for mlx, hf in matrices.items()}
    match = re.fullmatch(
        rf"model\.layers\.(\d+)\.{module}\.experts\.(\d+)\.({'|'.join(own)})\.(weight|scales|biases)", name
    )
    return (int(match[1]), int(match[2]), f"{own[match[3]]}.{match[4]}") if match else None
