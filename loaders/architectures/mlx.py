"""mlx-lm's models: the names of their tensors and their settings, where they differ from transformers'.

Facts are from mlx_lm 0.32, models/*.py (ModelArgs and sanitize). Names are the same except those of a mixture's
experts: mlx-lm stacks them, so that an expert's matrix is one of E along the first dimension of
MODULE.switch_mlp.gate_proj and its like. Norms of Gemma are stored as they are. deepseek_v3 is missing: mlx-lm cuts its
kv_b_proj by heads and transposes one half.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loaders.dtypes import DTYPES, DType

CAST_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxModel:
    """The way in which mlx-lm treats a model_type.

    experts: the module that holds experts, and transformers' names of their three matrices by mlx-lm's.
    num_experts: mlx-lm's key for the number of experts.
    has_head_dim: whether mlx-lm can be told a head_dim other than hidden_size / num_attention_heads.
    router_bits: bits of the router's affine groups of ROUTER_GROUP; None: as everything else.
    needs: settings for which mlx-lm has no default, with the values that transformers takes if they are missing.
    stack: mlx-lm's name of the module that stacks experts.
    head: the output projection is there or tied as the config says ("either"), must be there ("own"), or must not
    ("tied").
    is_nested: whether the language model's settings are in text_config.
    router_is_linear: whether mlx-lm has a linear layer as router, which it then quantizes.
    """

    experts: tuple[str, Mapping[str, str]] | None = None
    num_experts: str = ""
    has_head_dim: bool = False
    router_bits: int | None = None
    needs: Mapping[str, Any] = field(default_factory=dict)
    stack: str = "switch_mlp"
    head: str = "either"
    is_nested: bool = False
    router_is_linear: bool = True


GATED = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
QWEN_EXPERTS = ("mlp", GATED)
MIXTRAL_EXPERTS = ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
MODELS = {
    "llama": MlxModel(has_head_dim=True),
    "mistral": MlxModel(has_head_dim=True),
    "mixtral": MlxModel(experts=MIXTRAL_EXPERTS, num_experts="num_local_experts"),
    "qwen2": MlxModel(),
    "qwen2_moe": MlxModel(experts=QWEN_EXPERTS, num_experts="num_experts", head="own"),
    "qwen3": MlxModel(has_head_dim=True),
    "qwen3_moe": MlxModel(
        experts=QWEN_EXPERTS,
        num_experts="num_experts",
        has_head_dim=True,
        router_bits=8,
        needs={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False},
    ),
    "gemma": MlxModel(has_head_dim=True, head="tied"),
    "gemma2": MlxModel(has_head_dim=True, head="tied"),
    "gemma3_text": MlxModel(has_head_dim=True),
    "gemma3": MlxModel(has_head_dim=True, is_nested=True),
    "phi3": MlxModel(),
    "deepseek_v2": MlxModel(
        experts=QWEN_EXPERTS, num_experts="n_routed_experts", has_head_dim=True, head="own", router_is_linear=False
    ),
    "gpt_oss": MlxModel(
        experts=("mlp", GATED), num_experts="num_local_experts", has_head_dim=True, router_bits=8,
        stack="experts", head="own",
    ),
    "llama4": MlxModel(
        experts=("feed_forward", GATED), num_experts="num_local_experts", has_head_dim=True,
        stack="experts", head="own", is_nested=True,
    ),
}  # fmt: skip
ROUTER_GROUP = 64  # the group size that mlx-lm's models ask for where they set their router's bits
LAYER = r"(?:language_model\.)?model\.layers\.\d+"
TOWERS = r"^(?:vision_tower|vision_model|multi_modal_projector)\."  # parts that mlx-lm's language models leave out


def model_of(config: Mapping[str, Any]) -> MlxModel | None:
    """Return the entry of a config's model_type, or None if it is unknown."""
    return MODELS.get(str(config.get("model_type")))


def convert_dtype(config: Mapping[str, Any]) -> DType | None:
    """Return the dtype to which mlx_lm.convert casts all float weights first; None if each keeps its own.

    mlx_lm.convert reads `torch_dtype`, or the `dtype` of a text_config, but not the top `dtype` of transformers 5.
    """
    text = config.get("text_config")
    name = config.get("torch_dtype") or (text.get("dtype") if isinstance(text, Mapping) else None)
    return DTYPES[CAST_DTYPES[name]] if isinstance(name, str) and name in CAST_DTYPES else None


# --- names


def mlx_name(name: str) -> str:
    """Return mlx-lm's name of a tensor: a model saved without its head, as sentence encoders are, lacks `model.`."""
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def stack_of(model: MlxModel, name: str) -> tuple[str, int] | None:
    """Return the stacked weight or bias of which an expert's tensor is a part, and the expert's number."""
    if model.experts is None:
        return None
    module, matrices = model.experts
    own = {hf: mlx for mlx, hf in matrices.items()}
    match = re.fullmatch(rf"({LAYER}\.{module})\.experts\.(\d+)\.({'|'.join(own)})\.(weight|bias)", name)
    return (f"{match[1]}.{model.stack}.{own[match[3]]}.{match[4]}", int(match[2])) if match else None


def is_stack(model: MlxModel | None, name: str) -> bool:
    """Whether a stored tensor holds a layer's experts."""
    return model is not None and expert_names(model, name, 1) is not None


def expert_names(model: MlxModel, stacked: str, count: int) -> tuple[str, ...] | None:
    """Return transformers' names of the experts in a stacked weight or bias, in order; None if it is no stack."""
    if model.experts is None:
        return None
    module, matrices = model.experts
    match = re.fullmatch(rf"({LAYER}\.{module})\.{model.stack}\.({'|'.join(matrices)})\.(weight|bias)", stacked)
    if match is None:
        return None
    return tuple(f"{match[1]}.experts.{e}.{matrices[match[2]]}.{match[3]}" for e in range(count))


# --- the packed container's experts, whose matrices have mlx-lm's names


def packed_experts(config: Mapping[str, Any]) -> tuple[str, Mapping[str, str]]:
    """Return the module that holds experts, and transformers' names of their matrices by mlx-lm's.

    A model that is unknown gets the most common ones.
    """
    model = model_of(config)
    return QWEN_EXPERTS if model is None or model.experts is None else model.experts


def packed_expert_name(config: Mapping[str, Any], layer: int, expert: int, component: str) -> str:
    """Return transformers' name of a component of an expert, such as "gate_proj.weight"."""
    module, matrices = packed_experts(config)
    matrix, _, suffix = component.partition(".")
    return f"model.layers.{layer}.{module}.experts.{expert}.{matrices[matrix]}.{suffix}"


def packed_expert(config: Mapping[str, Any], name: str) -> tuple[int, int, str] | None:
    """Return the layer, expert and component that an expert's tensor is; None for any other tensor."""
    module, matrices = packed_experts(config)
    own = {hf: mlx for mlx, hf in matrices.items()}
    match = re.fullmatch(
        rf"model\.layers\.(\d+)\.{module}\.experts\.(\d+)\.({'|'.join(own)})\.(weight|scales|biases)", name
    )
    return (int(match[1]), int(match[2]), f"{own[match[3]]}.{match[4]}") if match else None
