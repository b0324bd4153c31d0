"""What mlx-lm calls the tensors of a model, where it differs from transformers.

Facts from mlx_lm 0.32 (models/*.py, ModelArgs and sanitize). Names are the same but for a mixture's experts: it
stacks them, an expert's matrix is one of E along the first dimension of MODULE.switch_mlp.gate_proj and so on. Norms of
Gemma are stored as they are. deepseek_v3 is not here: mlx-lm cuts its kv_b_proj by heads, and transposes one half.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loaders.dtypes import DTYPES, DType

CAST_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class MlxModel:
    """A model_type that mlx-lm and we know.

    experts: the module that holds them and their three matrices' names, by those in the stack. stack: what mlx-lm calls
    the stacks within that module. has_head_dim: whether a head_dim other than hidden_size / num_attention_heads can be
    told. head: whether the output projection is there or tied as the config says ("either"), must be there ("own"), or
    must not ("tied"). needs: settings without a default, which older configs leave to transformers.
    is_nested: the language model's settings are in text_config. router_is_linear: whether mlx-lm quantizes it.
    """

    experts: tuple[str, Mapping[str, str]] | None = None
    num_experts: str = ""
    has_head_dim: bool = False
    router_bits: int | None = None  # of affine groups of 64; None: as everything else
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
    "mixtral": MlxModel(MIXTRAL_EXPERTS, "num_local_experts"),
    "qwen2": MlxModel(),
    "qwen2_moe": MlxModel(QWEN_EXPERTS, "num_experts", head="own"),
    "qwen3": MlxModel(has_head_dim=True),
    "qwen3_moe": MlxModel(
        QWEN_EXPERTS,
        "num_experts",
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
        QWEN_EXPERTS, "n_routed_experts", has_head_dim=True, head="own", router_is_linear=False
    ),
    "gpt_oss": MlxModel(
        ("mlp", GATED), "num_local_experts", has_head_dim=True, router_bits=8, stack="experts", head="own"
    ),
    "llama4": MlxModel(
        ("feed_forward", GATED), "num_local_experts", has_head_dim=True, stack="experts", head="own", is_nested=True
    ),
}  # fmt: skip
ROUTER_GROUP = 64
LAYER = r"(?:language_model\.)?model\.layers\.\d+"
TOWERS = r"^(?:vision_tower|vision_model|multi_modal_projector)\."  # which mlx-lm's language models leave out


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
    """The stacked weight or bias that an expert's is part of, and which part."""
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
    """The experts in a stacked weight or bias by transformers' names, in order."""
    if model.experts is None:
        return None
    module, matrices = model.experts
    match = re.fullmatch(rf"({LAYER}\.{module})\.{model.stack}\.({'|'.join(matrices)})\.(weight|bias)", stacked)
    if match is None:
        return None
    return tuple(f"{match[1]}.experts.{e}.{matrices[match[2]]}.{match[3]}" for e in range(count))


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
