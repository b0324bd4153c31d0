"""llama.cpp's architectures: tensor names in both directions, row orders, and config.json from metadata.

Names and keys are those of gguf-py (llama.cpp, gguf-py/gguf/constants.py) and of llama.cpp's converter
(conversion/llama.py, conversion/qwen.py). Only models listed here are converted between transformers' form and GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.architectures.families import text_config
from loaders.errors import BadSpec, setting
from loaders.specs import RowOrder

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


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp and the model types that it holds.

    `class_name` is transformers' class for config.json. `permutes` says that rows of q and k are in another order in a
    GGUF: llama.cpp's rotary embedding pairs neighbours, transformers' pairs the halves of a head (`permute` in
    conversion/llama.py).
    """

    name: str
    model_types: tuple[str, ...]
    class_name: str
    further_names: Mapping[str, str]  # of modules that LAYER_NAMES lacks, such as experts; as there
    permutes: bool = False

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
        return f"model.layers.{layer}.{known[inner]}.{suffix}" if inner in known else None

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
    Architecture("llama", ("llama", "mistral", "mixtral"), "LlamaForCausalLM", MIXTRAL_EXPERTS, permutes=True),
    Architecture("qwen2", ("qwen2",), "Qwen2ForCausalLM", {}),
    Architecture("qwen3", ("qwen3",), "Qwen3ForCausalLM", {}),
    Architecture("qwen3moe", ("qwen3_moe",), "Qwen3MoeForCausalLM", QWEN_EXPERTS),
)
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
    raise BadSpec(f"{setting('layout')}: gguf knows no architecture for model_type {model_type!r}; it knows {known}")


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


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta, rope_type and the scaling's settings from either style of config.json."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        block = text_config(config, key)
        found |= block if isinstance(block, Mapping) else {}
    if "type" in found:
        found.setdefault("rope_type", found["type"])
    theta = text_config(config, "rope_theta")
    if theta is not None:
        found.setdefault("rope_theta", theta)
    return found


# --- metadata -> config.json


def config_of(metadata: Mapping[str, Any], names: Sequence[str], dtype: str) -> dict[str, Any]:
    """Make a config.json from a GGUF's metadata (plain values by key) and tensor names.

    `dtype` is transformers' name for the weights' dtype. The result is empty for an unknown architecture.
    """
    architecture = architecture_named(metadata.get("general.architecture"))
    if architecture is None:
        return {}

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture.name}.{key}", default)

    heads, hidden = value("attention.head_count"), value("embedding_length")
    experts = value("expert_count", 0)
    # llama.cpp holds Mixtral as a llama with experts. A Mistral cannot be told from a Llama, and becomes one.
    model_type = "mixtral" if architecture.name == "llama" and experts else architecture.model_types[0]
    config: dict[str, Any] = {
        "architectures": [CLASS_NAMES.get(model_type, architecture.class_name)],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "vocab_size": value("vocab_size"),
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": dtype,
    }
    if value("attention.key_length") is not None:
        config["head_dim"] = value("attention.key_length")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if config["vocab_size"] is None and isinstance(tokens, list | tuple):
        config["vocab_size"] = len(tokens)
    for key in ("bos", "eos"):
        found = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if found is not None:
            config[f"{key}_token_id"] = found
    if experts:
        config["num_local_experts" if model_type == "mixtral" else "num_experts"] = experts
        config["num_experts_per_tok"] = value("expert_used_count")
        if architecture.name == "qwen3moe":
            config |= {"moe_intermediate_size": value("expert_feed_forward_length"), "norm_topk_prob": True}
    # Qwen2's attention always has biases, and its config no such key.
    if any(name.endswith("attn_q.bias") for name in names) and architecture.name != "qwen2":
        config["attention_bias"] = True
    scaling = value("rope.scaling.type")
    if scaling not in (None, "none"):
        config["rope_scaling"] = {"rope_type": scaling, "factor": value("rope.scaling.factor")}
        if value("rope.scaling.original_context_length") is not None:
            config["rope_scaling"]["original_max_position_embeddings"] = value("rope.scaling.original_context_length")
    return {key: found for key, found in config.items() if found is not None}
