"""Families of models: the roles, blocks and groups of their tensors, as tables of names by `model_type`.

A family gives each tensor a role (what the engine's module is), a block (the tensors that belong in one unit: a layer's
attention, or its MLP with all experts) and, where engines fuse several tensors, a group (q/k/v, gate/up). The generic
rows at the end serve tensors that a family does not name, and all tensors of an unknown model_type.

The tables were checked against the models of transformers 5.23, except for DeepSeek's layer for multi-token prediction,
and not against the headers of the large published checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loaders.architectures.diffusers import class_of
from loaders.architectures.generic import Generic, block_of, group_of
from loaders.architectures.stacks import GPT_OSS_STACKS, LLAMA4_STACKS, Stack, generic_stacks
from loaders.dtypes import DTYPES, DType, Shape

ROLES = {
    "attention": "a linear layer of attention",
    "mlp": "a linear layer of an MLP",
    "expert": "a linear layer of one expert of a mixture",
    "linear": "another linear layer",
    "vision": "a linear layer of a tower for images or sound, or between it and the text model",
    "linear_attention": "a linear layer of linear attention",
    "mtp": "a linear layer of a block for multi-token prediction",
    "fused": "a linear layer that transformers joins with others, or cuts in several, when it loads it",
    "sensitive": "a linear layer that its model's own class keeps in float32, or makes of several when it loads",
    "conv1d": "a linear layer that is stored as [inputs, outputs]",
    "embedding": "a table looked up by id",
    "head": "the output projection onto the vocabulary or the labels",
    "router": "what chooses a mixture's experts",
    "norm": "a normalization",
    "conv": "a convolution",
    "bias": "a bias",
    "buffer": "numbers that are no weights (position ids, ...)",
    "other": "anything else: stacked, one-dimensional, unknown",
}


NAMES = Generic()  # the meanings of names that hold for every model type


@dataclass(frozen=True, slots=True)
class Traits:
    """The facts about a tensor that its name and shape tell."""

    role: str
    block: str
    group: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The names of the tensors of some model types.

    `tensors` rows are (pattern, role, block, group); the first match wins, and block and group are expanded with its
    groups. `names` says what a tensor is that no row names.
    `tied` rows are (the name that stays, the name that goes) where config.json ties embeddings; `ties` is what
    an absent `tie_word_embeddings` means. `stacks` say how experts are stacked on disk, where they are.
    `single_experts` are engines for which transformers replaces a stack by a linear layer for each expert matrix.
    """

    name: str
    model_types: tuple[str, ...]
    tensors: tuple[tuple[re.Pattern[str], str, str, str | None], ...]
    tied: tuple[tuple[str, str], ...] = ()
    ties: bool = False
    stacks: tuple[Stack, ...] = ()
    single_experts: tuple[str, ...] = ()
    is_generic: bool = False
    names: Generic = NAMES

    def traits(self, name: str, shape: Shape) -> Traits:
        """Return a tensor's role, block and group."""
        for pattern, role, block, group in self.tensors:
            match = pattern.search(name)
            if match:
                return Traits(role, match.expand(block), None if group is None else match.expand(group))
        return Traits(self.names.role(name, shape), block_of(name), group_of(name) if self.is_generic else None)

    def has_row(self, name: str) -> bool:
        """Whether the table names a tensor."""
        return any(pattern.search(name) for pattern, *_ in self.tensors)

    def tied_pairs(self, config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Return the (kept, dropped) names that the engine ties for this config."""
        return self.tied if text_config(config, "tie_word_embeddings", self.ties) else ()


def text_config(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return a value of config.json, from the top or from the text part of a multimodal model's config."""
    nested = config.get("text_config")
    if key not in config and isinstance(nested, Mapping):
        return nested.get(key, default)
    return config.get(key, default)


def load_dtype(config: Mapping[str, Any]) -> DType | None:
    """Return the float dtype in which transformers loads the weights: `dtype`, or `torch_dtype` before version 5."""
    name = text_config(config, "dtype") or text_config(config, "torch_dtype")
    known = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return DTYPES[known[name]] if isinstance(name, str) and name in known else None


def _rows(*rows: tuple[str, str, str, str | None]) -> tuple[tuple[re.Pattern[str], str, str, str | None], ...]:
    return tuple((re.compile(pattern), role, block, group) for pattern, role, block, group in rows)


# Patterns begin with ^: searched for from every place of a name, .* would take time quadratic in its length.
LAYER = r"^(?P<layer>(?:.*\.)?layers\.\d+)\."
ATTENTION = _rows(
    (LAYER + r"self_attn\.[qkv]_proj\.weight$", "attention", r"\g<layer>.self_attn", r"\g<layer>.self_attn.qkv"),
    (LAYER + r"self_attn\.o_proj\.weight$", "attention", r"\g<layer>.self_attn", None),
    (LAYER + r"self_attn\.[qkvo]_proj\.bias$", "bias", r"\g<layer>.self_attn", None),
    (LAYER + r"self_attn\.[qk]_norm\.weight$", "norm", r"\g<layer>.self_attn", None),
    (LAYER + r"self_attn\.rotary_emb\.inv_freq$", "buffer", r"\g<layer>.self_attn", None),
    (LAYER + r"input_layernorm\.weight$", "norm", r"\g<layer>.self_attn", None),
    (LAYER + r"post_attention_layernorm\.weight$", "norm", r"\g<layer>.mlp", None),
)
MLP = _rows(
    (LAYER + r"mlp\.(?:gate|up)_proj\.weight$", "mlp", r"\g<layer>.mlp", r"\g<layer>.mlp.gate_up"),
    (LAYER + r"mlp\.down_proj\.weight$", "mlp", r"\g<layer>.mlp", None),
    (LAYER + r"mlp\.(?:gate|up|down)_proj\.bias$", "bias", r"\g<layer>.mlp", None),
)
QWEN_EXPERTS = _rows(
    (LAYER + r"mlp\.gate\.weight$", "router", r"\g<layer>.mlp", None),
    (
        LAYER + r"mlp\.experts\.(?P<expert>\d+)\.(?:gate|up)_proj\.weight$",
        "expert",
        r"\g<layer>.mlp",
        r"\g<layer>.mlp.experts.\g<expert>.gate_up",
    ),
    (LAYER + r"mlp\.experts\.\d+\.down_proj\.weight$", "expert", r"\g<layer>.mlp", None),
)
MIXTRAL_EXPERTS = _rows(
    (LAYER + r"block_sparse_moe\.gate\.weight$", "router", r"\g<layer>.mlp", None),
    (
        LAYER + r"block_sparse_moe\.experts\.(?P<expert>\d+)\.w[13]\.weight$",
        "expert",
        r"\g<layer>.mlp",
        r"\g<layer>.block_sparse_moe.experts.\g<expert>.w1_w3",
    ),
    (LAYER + r"block_sparse_moe\.experts\.\d+\.w2\.weight$", "expert", r"\g<layer>.mlp", None),
)
ENDS = _rows(
    (r"(?:^|\.)embed_tokens\.weight$", "embedding", "embed_tokens", None),
    (r"^(?:language_model\.)?(?:lm_head|score)\.weight$", "head", "lm_head", None),
    (r"^(?:model\.)?(?:language_model\.)?(?:model\.)?norm\.weight$", "norm", "norm", None),
)
SHARED_EXPERTS = _rows(
    (LAYER + r"mlp\.shared_expert_gate\.weight$", "router", r"\g<layer>.mlp", None),
    (
        LAYER + r"(?P<shared>(?:mlp|feed_forward)\.shared_experts?)\.(?:gate|up)_proj\.weight$",
        "mlp",
        r"\g<layer>.mlp",
        r"\g<layer>.\g<shared>.gate_up",
    ),
    (LAYER + r"(?:mlp|feed_forward)\.shared_experts?\.down_proj\.weight$", "mlp", r"\g<layer>.mlp", None),
)
# DeepSeek's attention, of which engines fuse the two projections to the latent space. The layer after the last is for
# multi-token prediction: its names are those of the published checkpoints, since transformers has no class for it.
MLA = _rows(
    (
        LAYER + r"self_attn\.(?:q_a_proj|kv_a_proj_with_mqa)\.weight$",
        "attention",
        r"\g<layer>.self_attn",
        r"\g<layer>.self_attn.qkv_a",
    ),
    (LAYER + r"self_attn\.indexer\.weights_proj\.weight$", "sensitive", r"\g<layer>.self_attn", None),
    (LAYER + r"self_attn\.indexer\.(?:wq_b|wk)\.weight$", "linear", r"\g<layer>", None),
    (LAYER + r"self_attn\.indexer\.k_norm\.weight$", "norm", r"\g<layer>", None),
    (LAYER + r"self_attn\.indexer\.k_norm\.bias$", "bias", r"\g<layer>", None),
    (LAYER + r"self_attn\.(?:q_b|kv_b|q)_proj\.weight$", "attention", r"\g<layer>.self_attn", None),
    (LAYER + r"self_attn\.(?:q_a_proj|kv_a_proj_with_mqa)\.bias$", "bias", r"\g<layer>.self_attn", None),
    (LAYER + r"self_attn\.(?:q_a|kv_a)_layernorm\.weight$", "norm", r"\g<layer>.self_attn", None),
    (LAYER + r"mlp\.gate\.e_score_correction_bias$", "router", r"\g<layer>.mlp", None),
    (LAYER + r"(?:eh_proj|embed_tokens|shared_head\.head)\.weight$", "other", r"\g<layer>.mtp", None),
    (LAYER + r"(?:enorm|hnorm|shared_head\.norm)\.weight$", "norm", r"\g<layer>.mtp", None),
)
GEMMA_NORMS = _rows((LAYER + r"(?:pre|post)_feedforward_layernorm\.weight$", "norm", r"\g<layer>.mlp", None))
PHI3 = _rows(  # whose layers are fused on disk
    (LAYER + r"self_attn\.qkv_proj\.weight$", "attention", r"\g<layer>.self_attn", None),
    (LAYER + r"mlp\.gate_up_proj\.weight$", "mlp", r"\g<layer>.mlp", None),
)
GPT_OSS = _rows(
    (LAYER + r"self_attn\.sinks$", "other", r"\g<layer>.self_attn", None),
    (LAYER + r"mlp\.router\.(?:weight|bias)$", "router", r"\g<layer>.mlp", None),
    (LAYER + r"mlp\.experts\.(?:\d+\.)?\w+?[._]bias$", "bias", r"\g<layer>.mlp", None),
    (LAYER + r"mlp\.experts\.(?:gate_up|down)_proj(?:_blocks|_scales)?$", "expert", r"\g<layer>.mlp", None),
)
LLAMA4 = _rows(
    (LAYER + r"feed_forward\.router\.weight$", "router", r"\g<layer>.mlp", None),
    (LAYER + r"feed_forward\.experts\.(?:gate_up|down)_proj$", "expert", r"\g<layer>.mlp", None),
    (
        LAYER + r"feed_forward\.experts\.(?P<expert>\d+)\.(?:gate|up)_proj\.weight$",
        "expert",
        r"\g<layer>.mlp",
        r"\g<layer>.feed_forward.experts.\g<expert>.gate_up",
    ),
    (LAYER + r"feed_forward\.experts\.\d+\.down_proj\.weight$", "expert", r"\g<layer>.mlp", None),
    (LAYER + r"feed_forward\.(?:gate|up)_proj\.weight$", "mlp", r"\g<layer>.mlp", r"\g<layer>.mlp.gate_up"),
    (LAYER + r"feed_forward\.down_proj\.weight$", "mlp", r"\g<layer>.mlp", None),
)
TOWER = r"^(?P<tower>(?:.*\.)?(?:vision_(?:tower|model)|multi_modal_projector))\."
TOWER_LAYER = r"^(?P<layer>(?:.*\.)?vision_(?:tower|model)\.(?:.*\.)?layers\.\d+)\."
TOWERS = _rows(
    (TOWER_LAYER + r".*norm\d?\.(?:weight|bias)$", "norm", r"\g<layer>", None),
    (TOWER_LAYER + r".*bias$", "bias", r"\g<layer>", None),
    (TOWER_LAYER + r".*(?:proj|fc\d)\.weight$", "vision", r"\g<layer>", None),
    (TOWER + r".*norm\w*\.(?:weight|bias)$", "norm", r"\g<tower>", None),
    (TOWER + r".*bias$", "bias", r"\g<tower>", None),
    (TOWER + r".*position_embedding\.weight$", "embedding", r"\g<tower>", None),
    (TOWER + r".*patch_embedding\.weight$", "conv", r"\g<tower>", None),
    (TOWER + r".*(?:proj|fc\d|linear(?:_\d)?)\.weight$", "vision", r"\g<tower>", None),
    (TOWER, "other", r"\g<tower>", None),
)
BERT_LAYER = r"^(?P<layer>(?:.*\.)?layer\.\d+)\."
BERT = _rows(
    (
        BERT_LAYER + r"attention\.self\.(?:query|key|value)\.weight$",
        "attention",
        r"\g<layer>.attention",
        r"\g<layer>.attention.qkv",
    ),
    (BERT_LAYER + r"attention\.output\.dense\.weight$", "attention", r"\g<layer>.attention", None),
    (BERT_LAYER + r"attention\.(?:self\.\w+|output\.dense)\.bias$", "bias", r"\g<layer>.attention", None),
    (BERT_LAYER + r"attention\.output\.LayerNorm\.(?:weight|bias|gamma|beta)$", "norm", r"\g<layer>.attention", None),
    (BERT_LAYER + r"(?:intermediate|output)\.dense\.weight$", "mlp", r"\g<layer>.mlp", None),
    (BERT_LAYER + r"(?:intermediate|output)\.dense\.bias$", "bias", r"\g<layer>.mlp", None),
    (BERT_LAYER + r"output\.LayerNorm\.(?:weight|bias|gamma|beta)$", "norm", r"\g<layer>.mlp", None),
    (r"(?:^|\.)embeddings\.position_ids$", "buffer", "embeddings", None),
    (r"(?:^|\.)embeddings\.\w+_embeddings\.weight$", "embedding", "embeddings", None),
    (r"(?:^|\.)embeddings\.LayerNorm\.(?:weight|bias|gamma|beta)$", "norm", "embeddings", None),
    (r"(?:^|\.)pooler\.dense\.weight$", "linear", "pooler", None),
    (r"(?:^|\.)predictions\.decoder\.weight$", "head", "predictions", None),
    (r"(?:^|\.)predictions\.transform\.dense\.weight$", "linear", "predictions", None),
    (r"(?:^|\.)predictions\.transform\.LayerNorm\.(?:weight|bias|gamma|beta)$", "norm", "predictions", None),
    (r"(?:^|\.)(?:classifier|seq_relationship|qa_outputs)\.weight$", "linear", "classifier", None),
    (r"^(?P<name>(?:.*\.)?(?:pooler|transform)\.dense\.bias)$", "bias", r"\g<name>", None),
    (
        r"^(?P<name>(?:.*\.)?(?:predictions(?:\.decoder)?|classifier|seq_relationship|qa_outputs)\.bias)$",
        "bias",
        r"\g<name>",
        None,
    ),
)
TIED_HEAD = (("model.embed_tokens.weight", "lm_head.weight"),)
TIED_GEMMA = (
    *TIED_HEAD,
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
)
TIED_BERT = (
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
)

FAMILIES = (
    Family(name="llama", model_types=("llama",), tensors=ATTENTION + MLP + ENDS, tied=TIED_HEAD),
    Family(name="mistral", model_types=("mistral",), tensors=ATTENTION + MLP + ENDS, tied=TIED_HEAD),
    Family(name="mixtral", model_types=("mixtral",), tensors=ATTENTION + MIXTRAL_EXPERTS + ENDS, tied=TIED_HEAD),
    Family(name="qwen2", model_types=("qwen2",), tensors=ATTENTION + MLP + ENDS, tied=TIED_HEAD),
    Family(name="qwen3", model_types=("qwen3",), tensors=ATTENTION + MLP + ENDS, tied=TIED_HEAD),
    Family(name="qwen3_moe", model_types=("qwen3_moe",), tensors=ATTENTION + QWEN_EXPERTS + MLP + ENDS, tied=TIED_HEAD),
    Family(
        name="qwen2_moe",
        model_types=("qwen2_moe",),
        tensors=ATTENTION + QWEN_EXPERTS + SHARED_EXPERTS + MLP + ENDS,
        tied=TIED_HEAD,
    ),
    Family(
        name="gemma",
        model_types=("gemma", "gemma2"),
        tensors=ATTENTION + GEMMA_NORMS + MLP + ENDS,
        tied=TIED_HEAD,
        ties=True,
    ),
    Family(name="phi3", model_types=("phi3",), tensors=PHI3 + ATTENTION + MLP + ENDS, tied=TIED_HEAD),
    Family(
        name="gemma3",
        model_types=("gemma3", "gemma3_text"),
        tensors=TOWERS + ATTENTION + GEMMA_NORMS + MLP + ENDS,
        tied=TIED_GEMMA,
        ties=True,
    ),
    Family(
        name="deepseek",
        model_types=("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"),
        tensors=MLA + ATTENTION + QWEN_EXPERTS + SHARED_EXPERTS + MLP + ENDS,
        tied=TIED_HEAD,
    ),
    Family(
        name="gpt_oss",
        model_types=("gpt_oss",),
        tensors=GPT_OSS + ATTENTION + QWEN_EXPERTS + ENDS,
        tied=TIED_HEAD,
        stacks=GPT_OSS_STACKS,
    ),
    Family(
        name="llama4",
        model_types=("llama4", "llama4_text"),
        tensors=TOWERS + ATTENTION + LLAMA4 + SHARED_EXPERTS + ENDS,
        tied=TIED_HEAD,
        stacks=LLAMA4_STACKS,
        single_experts=("bitsandbytes",),
    ),
    Family(name="bert", model_types=("bert",), tensors=BERT, tied=TIED_BERT, ties=True),
)
GENERIC = Family(name="generic", model_types=(), tensors=(), tied=TIED_HEAD, is_generic=True)


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json by its `model_type`, or a generic one if none knows it."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if class_of(config) is not None:
        return replace(GENERIC, name="diffusers", names=Generic.of(config), tied=())
    return replace(
        GENERIC,
        names=Generic.of(config),
        stacks=generic_stacks(config.get("model_type"), text_config(config, "hidden_size")),
    )


def natural_key(text: str) -> str:
    """Return a sort key that puts "layers.2" before "layers.10": in it, a number begins with how many digits it has."""
    return DIGITS.sub(_sorted_by_length, text)


DIGITS = re.compile("[0-9]+")


def _sorted_by_length(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0")
    return f"\0{chr(min(len(digits), 0xFFF))}{digits}"
