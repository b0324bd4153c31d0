"""The meanings of names in models that no family knows: names of published checkpoints, and what each tensor is."""

from __future__ import annotations

import pytest

from loaders.architectures.family import family_of
from loaders.architectures.generic import Generic

MATRICES = (
    # T5 calls its embedding `shared`; shared experts are none.
    ("t5", "shared.weight", "embedding"),
    ("glm4_moe", "model.layers.1.mlp.shared_experts.up_proj.weight", "linear"),
    ("granitemoehybrid", "model.layers.0.shared_mlp.input_linear.weight", "linear"),
    # A projection beside a convolution, or of embeddings, is a linear layer.
    ("lfm2", "model.layers.0.conv.in_proj.weight", "linear"),
    ("gemma4", "model.embed_vision.embedding_projection.weight", "vision"),
    ("gemma4", "model.language_model.per_layer_model_projection.weight", "linear"),
    ("gemma4", "model.language_model.embed_tokens_per_layer.weight", "embedding"),
    ("siglip2", "vision_model.embeddings.patch_embedding.weight", "vision"),
    ("siglip2", "vision_model.embeddings.position_embedding.weight", "embedding"),
    # Routers of two parts; a gate with more rows than columns is that of a gated MLP.
    ("granitemoe", "model.layers.0.block_sparse_moe.router.layer.weight", "router"),
    ("gemma4", "model.language_model.layers.0.router.proj.weight", "router"),
    ("hunyuan_v1_moe", "model.layers.0.mlp.gate.wg.weight", "router"),
    ("phimoe", "model.layers.0.block_sparse_moe.gate.weight", "router"),
    # `output` is a head at the top only.
    ("internlm2", "output.weight", "head"),
    ("roberta", "roberta.encoder.layer.0.attention.output.dense.weight", "linear"),
    ("roberta", "lm_head.dense.weight", "linear"),
    ("gpt_neox", "embed_out.weight", "head"),
    ("gpt_neox", "gpt_neox.embed_in.weight", "embedding"),
    ("whisper", "model.decoder.embed_positions.weight", "embedding"),
    ("llava", "language_model.lm_head.weight", "head"),
    # What the model's own class keeps in float32.
    ("t5", "encoder.block.0.layer.1.DenseReluDense.wo.weight", "sensitive"),
    ("glm_moe_dsa", "model.layers.0.self_attn.indexer.weights_proj.weight", "sensitive"),
    ("glm_moe_dsa", "model.layers.0.self_attn.indexer.wk.weight", "linear"),
    ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embedding"),
    # Parts of a model that recipes leave alone.
    ("qwen2_vl", "visual.blocks.0.attn.qkv.weight", "vision"),
    ("qwen3_5", "model.language_model.layers.0.linear_attn.in_proj_qkv.weight", "linear_attention"),
    ("qwen3_5", "mtp.layers.0.self_attn.q_proj.weight", "mtp"),
    ("nemotron_h", "backbone.layers.0.mixer.in_proj.weight", "linear"),
    ("gpt2", "h.0.attn.c_attn.weight", "conv1d"),
    ("gpt2", "wpe.weight", "embedding"),
    ("flux", "transformer_blocks.0.norm1.linear.weight", "linear"),
    ("olmoe", "model.layers.0.mlp.experts.7.up_proj.weight", "expert"),
    # Tables that are not called embedding, or are one of several.
    ("sam2", "mask_decoder.mask_tokens.weight", "embedding"),
    ("sam", "prompt_encoder.point_embed.3.weight", "embedding"),
    ("muse_spark", "model.vision_tower.patch_embedder.position_embedding_table.weight", "embedding"),
    ("pegasus_x", "model.encoder.embed_global.weight", "embedding"),
    ("markuplm", "embeddings.xpath_embeddings.xpath_tag_sub_embeddings.7.weight", "embedding"),
    ("bark", "fine_acoustics.input_embeds_layers.2.weight", "embedding"),
    ("pix2struct", "encoder.embeddings.row_embedder.weight", "embedding"),
    ("flux", "x_embedder.weight", "linear"),
    # A weight that another layer shares, or that a part's class keeps in float32.
    ("zamba2", "model.layers.6.shared_transformer.self_attn.q_proj.weight", "sensitive"),
    ("kyutai_speech_to_text", "codec_model.decoder_transformer.layers.0.mlp.fc1.weight", "sensitive"),
    # A head for each of several codebooks.
    ("bark", "fine_acoustics.lm_heads.0.weight", "head"),
)


@pytest.mark.quick
@pytest.mark.parametrize(("model_type", "name", "role"), MATRICES)
def test_a_matrix_is_what_its_name_means(model_type: str, name: str, role: str) -> None:
    assert Generic((model_type,)).role(name, (8, 64)) == role


def test_a_gate_of_a_gated_mlp_is_a_linear_layer() -> None:
    assert Generic().role("layers.0.ffn.gate.weight", (256, 64)) == "linear"


def test_a_gate_with_a_column_for_each_expert_is_a_router() -> None:
    assert Generic().role("layers.0.mlp.gate.weight", (2560, 64)) == "router"


def test_a_matrix_of_nothing_is_no_linear_layer() -> None:
    assert Generic().role("query.weight", (0, 256)) == "other"


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("vision_model.head.attention.in_proj_weight", (192, 64), "other"),  # no module of this name
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 64), "other"),
        ("model.layers.0.conv.conv.weight", (64, 1, 3), "conv"),
        ("model.layers.0.input_layernorm.weight", (64,), "norm"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (8,), "router"),
        ("h.0.attn.bias", (1, 1, 64, 64), "buffer"),
    ],
)
def test_what_is_no_matrix_called_weight_is_no_layer(name: str, shape: tuple[int, ...], role: str) -> None:
    assert Generic().role(name, shape) == role


def test_layers_after_the_last_are_for_multi_token_prediction() -> None:
    family = family_of({"model_type": "glm4_moe", "num_hidden_layers": 46})
    assert family.traits("model.layers.46.self_attn.q_proj.weight", (64, 64)).role == "mtp"
    assert family.traits("model.layers.45.self_attn.q_proj.weight", (64, 64)).role == "linear"
    assert family.traits("vision_tower.layers.46.self_attn.q_proj.weight", (64, 64)).role == "vision"


def test_layers_that_engines_fuse_are_a_group() -> None:
    family = family_of({"model_type": "unheard_of"})
    groups = {family.traits(f"model.layers.0.self_attn.{p}_proj.weight", (64, 64)).group for p in "qkv"}
    assert groups == {"model.layers.0.self_attn.qkv"}


@pytest.mark.parametrize("shape", [(4, 64, 32), (4, 32, 64)])
def test_the_shape_of_a_stack_tells_its_outputs(shape: tuple[int, int, int]) -> None:
    """qwen3_5_moe stacks [experts, 2 x intermediate, hidden], qwen3_vl_moe [experts, hidden, 2 x intermediate]."""
    family = family_of({"model_type": "unheard_of", "text_config": {"hidden_size": 32}})
    [stack] = [s for s in family.stacks if s.pattern.search("layers.0.mlp.experts.gate_up_proj")]
    assert stack.transposed(shape) is (shape[1] == 32)
    assert stack.transposed((4, 32, 32)) is None
