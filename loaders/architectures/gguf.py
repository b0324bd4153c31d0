"""llama.cpp's architectures: tensor names in both directions, and row orders.

Names and keys are those of gguf-py (llama.cpp, gguf-py/gguf/constants.py) and of llama.cpp's converter
(conversion/llama.py, conversion/qwen.py). Only models listed here are converted between transformers' form and GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loaders.architectures.families import text_config
from loaders.errors import BadSpec, setting
from loaders.specs import RowOrder
from loaders.words import model_type_said

# transformers' name of a module within a layer -> GGUF's; weights and biases alike
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# GGUF stacks experts: {} stands for an expert's number in transformers' name
QWEN_EXPERTS = {
    "mlp.gate": "ffn_gate_inp", "mlp.experts.{}.gate_proj": "ffn_gate_exps", "mlp.experts.{}.up_proj": "ffn_up_exps",
    "mlp.experts.{}.down_proj": "ffn_down_exps",
}  # fmt: skip
MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate": "ffn_gate_inp", "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.{}.w3": "ffn_up_exps", "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
}  # fmt: skip
# A model saved without its head, as sentence encoders are, has names without `model.`.
HF_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.(.+)\.(weight|bias)$")
EXPERT = re.compile(r"\.experts\.(\d+)\.")
GGUF_LAYER = re.compile(r"^blk\.(\d+)\.(.+)\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class GgufName:
    """The place of transformers' tensor in a GGUF: a name, and the expert's number in a stack."""

    name: str
    expert: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp and the model types that it holds.

    `class_name` is transformers' class for config.json. `permutes` says that rows of q and k are in another order in a
    GGUF: llama.cpp's rotary embedding pairs neighbours, transformers' pairs the halves of a head (`permute` in
    conversion/llama.py). `has_factors` says that llama.cpp loads the tensor rope_freqs.weight. `biases` are the modules
    whose biases it loads.
    """

    name: str
    model_types: tuple[str, ...]
    class_name: str
    # Names of modules that LAYER_NAMES lacks, such as experts; as there.
    further_names: Mapping[str, str] = field(default_factory=dict)
    permutes: bool = False
    has_factors: bool = False
    biases: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    def gguf_name(self, name: str) -> GgufName | None:
        """Return where transformers' tensor is in a GGUF, or None if the architecture has no such tensor."""
        top, _, suffix = name.rpartition(".")
        top = f"model.{top}" if top in ("embed_tokens", "norm") else top
        if top in TOP_NAMES and suffix == "weight":
            return GgufName(f"{TOP_NAMES[top]}.weight")
        match = HF_LAYER.match(name)
        if match is None:
            return None
        layer, inner, suffix = match.groups()
        if suffix == "bias" and inner not in self.biases:
            return None
        if inner in LAYER_NAMES:
            return GgufName(f"blk.{layer}.{LAYER_NAMES[inner]}.{suffix}")
        expert = EXPERT.search(f".{inner}.")
        found = self.further_names.get(EXPERT.sub(".experts.{}.", f".{inner}.").strip("."))
        if found is None or suffix != "weight":
            return None
        return GgufName(f"blk.{layer}.{found}.weight", None if expert is None else int(expert[1]))

    def hf_name(self, name: str) -> str | None:
        """Return transformers' name of a GGUF's tensor, with {} for an expert's number; None if it is unknown."""
        tops = {f"{gguf}.weight": f"{hf}.weight" for hf, gguf in TOP_NAMES.items()}
        if name in tops:
            return tops[name]
        match = GGUF_LAYER.match(name)
        if match is None:
            return None
        layer, inner, suffix = match.groups()
        known = {gguf: hf for hf, gguf in (LAYER_NAMES | dict(self.further_names)).items()}
        found = known.get(inner)
        if found is None or (suffix == "bias" and found not in self.biases):
            return None
        return f"model.layers.{layer}.{found}.{suffix}"

    def row_order(self, name: str, rows: int, config: Mapping[str, Any], *, inverse: bool) -> RowOrder | None:
        """Return the order in which GGUF takes the rows of transformers' tensor `name`; with `inverse`, the way back.

        Raises:
            BadSpec: the rows do not divide into heads.
        """
        match = HF_LAYER.match(name)
        if not self.permutes or match is None or match[2] not in ("self_attn.q_proj", "self_attn.k_proj"):
            return None
        heads = number(config, "num_attention_heads")
        if match[2] == "self_attn.k_proj":
            heads = number(config, "num_key_value_heads", heads)
        if heads < 1 or rows % (2 * heads):
            raise BadSpec(f"{name}: its {rows} rows do not divide into {heads} heads of an even size")
        return RowOrder(rows // heads, inverse)


ARCHITECTURES = (
    Architecture(
        name="llama", model_types=("llama", "mistral", "mixtral"), class_name="LlamaForCausalLM",
        further_names=MIXTRAL_EXPERTS, permutes=True, has_factors=True,
        biases=tuple(inner for inner in LAYER_NAMES if inner.endswith("_proj")),
    ),
    Architecture(name="qwen2", model_types=("qwen2",), class_name="Qwen2ForCausalLM"),
    Architecture(name="qwen3", model_types=("qwen3",), class_name="Qwen3ForCausalLM"),
    Architecture(
        name="qwen3moe", model_types=("qwen3_moe",), class_name="Qwen3MoeForCausalLM", further_names=QWEN_EXPERTS
    ),
)  # fmt: skip
CLASS_NAMES = {"mixtral": "MixtralForCausalLM", "mistral": "MistralForCausalLM"}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json.

    Raises:
        BadSpec: none here is for its model_type.
    """
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(t for a in ARCHITECTURES for t in a.model_types)
    raise BadSpec(f"{setting('layout')}: gguf knows no architecture for {model_type_said(config)}; it knows {known}")


def architecture_named(name: object) -> Architecture | None:
    """Return the architecture of the name that a GGUF gives as general.architecture."""
    return next((a for a in ARCHITECTURES if a.name == name), None)


def number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a whole number of config.json.

    Raises:
        BadSpec: it is missing, negative, or not a whole number.
    """
    found = text_config(config, key)
    found = default if found is None else found
    if type(found) is not int or found < 0:
        raise BadSpec(f"config.json: expected a whole number as {key}, found {found!r}")
    return found


def experts_of(config: Mapping[str, Any]) -> int:
    """Return the number of experts in a layer; 0 for a dense model. transformers 5 renamed the key."""
    for key in ("num_local_experts", "num_experts"):
        if text_config(config, key) is not None:
            return number(config, key)
    return 0
