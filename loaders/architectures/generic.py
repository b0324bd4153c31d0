"""What the names of tensors usually mean: the roles of a model_type that no family knows, as rows of patterns.

Each row is about whole components of a name, between dots: `mlp.shared_expert.up_proj` is no embedding though T5 calls
its own `shared`, and `embedding_projection` is a projection. A matrix that no row names is a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loaders.architectures.diffusers import DiffusersClass, class_of
from loaders.architectures.renames import fused_modules, is_bound
from loaders.dtypes import Shape


def _compiled(*rows: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), role) for pattern, role in rows)


# Names of any number of dimensions; the first that matches says what the tensor is.
ANY_SHAPE = _compiled(
    (r"(?:position_ids|token_type_ids|inv_freq|num_batches_tracked|running_(?:mean|var))$", "buffer"),
    (r"attn\.(?:masked_)?bias$", "buffer"),  # GPT-2's causal mask
    (r"e_score_correction_bias$", "router"),
    (r"(?:^|[._])bias$", "bias"),
    (r"(?:^|[._])(?:(?:layer|group|batch|rms)_?norm|norm|ln|bn)\d*(?:_\w+)?\.(?:weight|gamma|beta)$", "norm"),
    (r"norm\d*\.(?:weight|gamma|beta)$", "norm"),
    (r"(?:^|[._])conv\w*\.weight$", "conv"),
)  # fmt: skip
# Matrices called weight. What no row names is a linear layer.
MATRICES = _compiled(
    (r"(?:^|[._])conv\w*\.weight$", "conv"),
    (r"(?:^|\.)patch_embed(?:der|ding)?\.weight$", "linear"),  # patches are multiplied, no table is looked up
    (r"(?:^|[._])(?:embed|embeds|embedding|embeddings|emb|wte|wpe)\.weight$", "embedding"),
    (r"(?:^|[._])embed_(?!out\.)(?:\w*_)?(?:tokens|in|positions|pos|layer|ids?|codes?)(?:_\w+)?\.weight$", "embedding"),
    (r"(?:^|\.)(?:shared|relative_attention_bias)\.weight$", "embedding"),  # T5's names
    # Tables under other names: learned tokens, points and codes, or one table for each of several inputs.
    (r"(?:^|[._])(?:tokens?|codebook|table|query_feat|bias_values)\.weight$", "embedding"),
    (r"(?:^|[._])embed(?:s_layers?|_global|_timestep)(?:\.\d+)?\.weight$", "embedding"),
    (r"(?:^|[._])(?:embeddings|point_embed|codebooks?)\.\d+\.weight$", "embedding"),
    (r"(?:(?:^|\.)(?:row|column)_embedder|CodepointEmbedder_\d+)\.weight$", "embedding"),
    (r"(?:^|\.)(?:lm_heads?|embed_out|proj_out|unembed)(?:\.\d+)?\.weight$", "head"),
    (r"^(?:(?:model|transformer|language_model)\.)*(?:head|output|output_layer|output_projection)\.weight$", "head"),
    (r"(?:^|\.)shared_head\.head\.weight$", "other"),  # a copy of the head, in DeepSeek's multi-token prediction
    (r"(?:^|\.)(?:score|classifier)\.(?:\w+\.)*weight$", "head"),
    (r"(?:^|\.)(?:cls\.(?:\w+\.)*|lm_head\.)?(?:decoder|seq_relationship)\.weight$", "head"),
    (r"(?:^|\.)\w*router\.(?:\w+\.)*weight$", "router"),
    (r"(?:^|\.)(?:gate\.wg|wg|shared_expert_gate)\.weight$", "router"),
    (r"(?:^|\.)experts?\.\d+\.", "expert"),
)
GATE = re.compile(r"(?:^|\.)gate\.weight$")
FEW_EXPERTS = 8  # the model's width is at least so many times their number, and its MLP's less than so many times it
# Layers that are linear, and that recipes for some engines leave alone.
LINEAR_KINDS = _compiled(
    (r"(?:^|\.)indexer\.(?:\w+\.)*weights_proj\.", "sensitive"),  # DeepSeek's sparse attention, kept by every recipe
    (
        r"(?:^|\.)(visual|vision|vision_\w+|\w+_vision|vit|vpm|visual_\w+|image_\w+|audio|audio_\w+|\w+_audio"
        r"|speech_encoder|sam_model|qformer|resampler|aligner|merger|connector|projector|\w+_projector|mlp1|patch_merge\w*)\.",
        "vision",
    ),
    (r"(?:^|\.)(linear_attn)\.", "linear_attention"),
    (r"(?:^|\.)(mtp|mtp_\w+|nextn|nextn_\w+)\.", "mtp"),
)
# A layer of the text model: one after the last of config.json's layers is for multi-token prediction.
MOST_LAYERS = 1_000_000  # a larger number is none of a layer; one stands for all layers in `KnownTraits`
TEXT_LAYER = re.compile(r"^(?:(?:model|language_model|transformer)\.)*layers\.([0-9]{1,20})\.")
BLOCK = re.compile(r"^(.*?\b(?:layers?|blocks?|h|blk)\.\d+)\.")
# Layers that engines fuse: their scales must be one where a scheme shares them.
FUSED = (
    (re.compile(r"^(.*attn)\.[qkv]_proj\.weight$"), r"\1.qkv"),
    (re.compile(r"^(.*)\.(?:gate|up)_proj\.weight$"), r"\1.gate_up"),
)


# Names that mean something else in some model types: (types, pattern, role), before all other rows.
SPECIAL = tuple(
    (model_types, re.compile(pattern), role)
    for model_types, pattern, role in (
        # wo_a is a class of its own in transformers, whose matrices are multiplied group by group.
        (("deepseek_v4",), r"\.(?:compressor|wo_a)\.", "sensitive"),
        # These towers have one matrix for q, k and v on disk, which transformers cuts in three when it loads them.
        (("kimi_k25",), r"(?:^|\.)vision_tower\.", "sensitive"),
        (("step3p7", "step3_vl"), r"(?:^|\.)vision_model\.", "sensitive"),
        (("fuyu",), r"(?:^|\.)vision_embed_tokens\.", "vision"),
        (("inkling_mm_model", "inkling_audio"), r"audio\.encoder\.weight$", "embedding"),
        # A layer of its own class, with its own rounding.
        (("ibert",), r"\.encoder\.layer\.", "sensitive"),
        (("ctrl",), r"(?:^|\.)w\.weight$", "embedding"),
        (("sam3", "sam3_lite_text", "sam3_video"), r"\.reference_points\.weight$", "embedding"),
        # GPT-2's Conv1D, a linear layer that is stored as [inputs, outputs].
        (
            ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"),
            r"\.(?:c_attn|c_proj|c_fc|q_attn)\.weight$", "conv1d",
        ),
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Generic:
    """The meanings of names in a model whose type no family knows.

    `model_types` are config.json's, and those of the models in it. `layers` is the number of the text model's layers,
    or None if config.json does not say it. `part` is the class of a component of a diffusers pipeline.
    """

    model_types: tuple[str, ...] = ()
    layers: int | None = None
    part: DiffusersClass | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Generic:
        parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
        types = [part.get("model_type") for part in parts]
        text = config.get("text_config")
        layers = (text if isinstance(text, Mapping) else config).get("num_hidden_layers")
        if (part := class_of(config)) is not None:
            return cls(part=DiffusersClass(part))
        return cls(
            tuple(model_type for model_type in types if isinstance(model_type, str)),
            layers if isinstance(layers, int) and not isinstance(layers, bool) else None,
        )

    def role(self, name: str, shape: Shape) -> str:
        """Return a tensor's role: see `loaders.architectures.family.ROLES`."""
        is_matrix = len(shape) == 2 and name.endswith(".weight")
        if 0 in shape:
            return "other"
        if is_matrix and self.part is not None:
            return self.part.role(name)
        for model_types, pattern, role in SPECIAL:
            if not set(model_types).isdisjoint(self.model_types) and pattern.search(name):
                return role if is_matrix else _of_any_shape(name)
        found = _of_any_shape(name)
        if not is_matrix:
            return found
        # A linear layer's bias or norm has one dimension; a matrix of such a name is a layer of a module called so.
        if found in ("router", "buffer"):
            return found
        # A gate that chooses experts has a row, or a column, for each of them; that of a gated MLP has some more rows
        # than columns.
        if GATE.search(name) and (shape[0] < shape[1] or shape[0] >= FEW_EXPERTS * shape[1]):
            return "router"
        base = next((role for pattern, role in MATRICES if pattern.search(name)), "linear")
        if base not in ("linear", "expert"):
            return base
        return self._kind_of_linear(name, base)

    def _kind_of_linear(self, name: str, base: str) -> str:
        if self.is_beyond(name):
            return "mtp"
        if base == "linear" and is_bound(name.removesuffix(".weight"), self.model_types):
            return "sensitive"
        kind = next((role for pattern, role in LINEAR_KINDS if pattern.search(name)), base)
        is_fused = base == "linear" and kind != "mtp" and bool(fused_modules(name, self.model_types))
        if is_fused:
            return "sensitive" if kind == "vision" else "fused"
        return kind

    def is_beyond(self, name: str) -> bool:
        """Whether a tensor is in a layer after the last that config.json counts: the only number that tells a role."""
        if self.layers is None:
            return False
        layer = TEXT_LAYER.match(name)
        return layer is not None and self.layers <= int(layer[1]) < MOST_LAYERS


def _of_any_shape(name: str) -> str:
    return next((role for pattern, role in ANY_SHAPE if pattern.search(name)), "other")


def part_of(name: str) -> str | None:
    """Return the component of a name that stands for a whole part of the model: a tower, linear attention, MTP."""
    for pattern, role in LINEAR_KINDS:
        match = pattern.search(name)
        if match and role != "sensitive":
            return match[1]
    return None


def block_of(name: str) -> str:
    """Return the numbered module that a tensor is in, or its own name."""
    match = BLOCK.match(name)
    return match[1] if match else name


def group_of(name: str) -> str | None:
    """Return the name of the layer that engines fuse this one into, if they do."""
    for pattern, group in FUSED:
        if match := pattern.match(name):
            return match.expand(group)
    return None
