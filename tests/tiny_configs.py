"""Tiny configurations of published model types: a few layers, and every kind of layer that the type has.

Where tests/headers has a published config.json, that is taken, and its sizes are replaced by the small ones here, so
that activations, scalings and whatever else an engine's converter reads are those of a real model. For the other types
the defaults of transformers' config class are taken. Rows divide by 32, and those of the dense down projection by 256.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ROWS = 320  # of the vocabulary
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": ROWS,
}  # fmt: skip
ENCODER = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}  # which has no such key


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A tiny model of a type.

    base: the layout of tests/headers whose config.json is taken; without it, the defaults of `model_type`
    config: what replaces its values, part by part
    next_tokens: the form in which layers for multi-token prediction are stored, which transformers' classes lack: see
        tests/next_tokens.py
    tokenizer: a kind of tests/tiny_tokenizers.py
    centred: norms are stored minus one
    mxfp4, fp4, stacked: how experts are stored: as GPT-OSS's, as DeepSeek V4's, or in two stacks a layer,
        `transposed` ones as [experts, inputs, outputs]
    renames: [pattern, replacement] from names that the class saves to the published ones, where these differ
    as_published: config.json stays in its published words, where the class saves others, and llama.cpp's converter is
        given these words too
    pre: the pre-tokenizer that the converter is given
    plain_vocabulary: the converter writes the vocabulary as a byte-level BPE's, where it wants code that comes with the
        published tokenizer, or an older transformers'
    """

    model_type: str
    base: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    next_tokens: str = ""
    tokenizer: str = "bpe"
    centred: bool = False
    mxfp4: bool = False
    fp4: bool = False
    stacked: bool = False
    transposed: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    as_published: bool = False
    raw: bool = False
    pre: str = "gpt-2"
    plain_vocabulary: bool = False


def text(**sizes: Any) -> dict[str, Any]:
    return {**SIZES, "head_dim": 32, **sizes}


EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}  # fmt: skip
INDEXER: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 64, "index_topk": 8}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 4,
}  # fmt: skip
MROPE = {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000000,
         "partial_rotary_factor": 0.25}  # fmt: skip
QWEN_VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "num_position_embeddings": 16, "spatial_merge_size": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SLIDING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
GEMMA4: dict[str, Any] = {
    **SLIDING, "global_head_dim": 64, "num_global_key_value_heads": 1, "vocab_size_per_layer_input": ROWS,
}  # fmt: skip
GEMMA4_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16, "patch_size": 4, "position_embedding_size": 16,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "type": "longrope", "short_factor": [1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 48.0],
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_d_state": 32, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_chunk_size": 16}
MIMO_LAYERS = {"hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "num_hidden_layers": 3}

# In the order of demand.
TINY: dict[str, Tiny] = {
    "qwen3_5": Tiny(
        model_type="qwen3_5", base="qwen3.5-27b", next_tokens="qwen", centred=True,
        config={"text_config": text(**LINEAR, rope_parameters=MROPE), "vision_config": QWEN_VISION},
    ),
    "qwen3_5_moe": Tiny(
        model_type="qwen3_5_moe", base="qwen3.5-35b-a3b", next_tokens="qwen", centred=True, stacked=True,
        config={
            "text_config": text(**LINEAR, **EXPERTS, shared_expert_intermediate_size=64, rope_parameters=MROPE),
            "vision_config": QWEN_VISION,
        },
    ),
    "qwen3_next": Tiny(
        model_type="qwen3_next", base="qwen3-next-80b-fp8", next_tokens="qwen", centred=True,
        config=text(**LINEAR, **EXPERTS, shared_expert_intermediate_size=64),
    ),
    "gemma4": Tiny(
        model_type="gemma4", base="gemma-4-31b", tokenizer="bpe_spaces",
        config={"text_config": text(**GEMMA4), "vision_config": GEMMA4_VISION},
    ),
    "gemma4_moe": Tiny(
        model_type="gemma4", base="gemma-4-26b-a4b", tokenizer="bpe_spaces",
        config={
            "text_config": text(**GEMMA4, num_experts=4, top_k_experts=2, moe_intermediate_size=64),
            "vision_config": GEMMA4_VISION,
        },
    ),
    "gemma4_per_layer": Tiny(  # as E2B and E4B: embeddings for each layer, and layers that share keys and values
        model_type="gemma4", base="gemma-4-31b", tokenizer="bpe_spaces",
        config={
            "text_config": text(
                **{**GEMMA4, "num_global_key_value_heads": None}, attention_k_eq_v=False,
                hidden_size_per_layer_input=32, num_kv_shared_layers=2, use_double_wide_mlp=True,
            ) | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
            "vision_config": GEMMA4_VISION,
        },
    ),
    "gemma3": Tiny(
        model_type="gemma3", base="medgemma-27b", tokenizer="sentencepiece", centred=True,
        renames=((r"^vision_tower\.", "vision_tower.vision_model."),),
        config={
            "text_config": text(**SLIDING, query_pre_attn_scalar=32), "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma3_text": Tiny(
        model_type="gemma3_text", base="gemma-3-4b-text", tokenizer="sentencepiece", centred=True,
        config=text(**SLIDING, sliding_window_pattern=2, query_pre_attn_scalar=32),
    ),
    "gemma": Tiny(model_type="gemma", base="gemma-2b", tokenizer="sentencepiece", centred=True, config=text()),
    "gemma2": Tiny(
        model_type="gemma2", tokenizer="sentencepiece", centred=True,
        config=text(**SLIDING, query_pre_attn_scalar=32),
    ),
    "glm4_moe": Tiny(
        model_type="glm4_moe", base="glm-4.5-air", tokenizer="bpe_glm",
        next_tokens="deepseek_whole",
        config=text(**ROUTED, use_qk_norm=True),
    ),
    "glm4": Tiny(model_type="glm4", tokenizer="bpe_glm", config=text()),
    "glm_moe_dsa": Tiny(
        model_type="glm_moe_dsa", base="glm-5.2", tokenizer="bpe_glm", next_tokens="deepseek",
        config=text(
            **ROUTED, **LATENT, **INDEXER, qk_head_dim=64, indexer_types=["full", "shared", "full"],
            mlp_layer_types=["dense", "sparse", "sparse"], index_topk_freq=2, index_skip_topk_offset=1,
        ) | {"head_dim": 32},
    ),
    "deepseek_v2": Tiny(
        model_type="deepseek_v2", base="deepseek-v2-lite", config={**SIZES, **ROUTED, **LATENT, "q_lora_rank": None},
    ),
    "deepseek_v3": Tiny(
        model_type="deepseek_v3", base="deepseek-v3", next_tokens="deepseek_whole",
        config={**SIZES, **ROUTED, **LATENT, "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v32": Tiny(
        model_type="deepseek_v32", base="deepseek-v3.2", plain_vocabulary=True,
        next_tokens="deepseek_whole",
        config={**SIZES, **ROUTED, **LATENT, **INDEXER, "n_group": 2, "topk_group": 1},
    ),
    "dots1": Tiny(
        model_type="dots1",
        config=text(
            **ROUTED, num_key_value_heads=4, n_shared_experts=2, layer_types=["full_attention"] * 3,
            routed_scaling_factor=2.5, norm_topk_prob=True, scoring_func="sigmoid",
        ),
    ),
    "kimi_k2": Tiny(model_type="kimi_k2", base="kimi-k2", config={**SIZES, **ROUTED, **LATENT}),
    "kimi_k25": Tiny(
        model_type="kimi_k25", base="kimi-k2.5",
        renames=((r"^(language_model\..*)\.blocks\.", r"\1.layers."), (r"^model\.mm_projector", "mm_projector"),
                 (r"^vision_tower\.encoder\.patch_embed", "vision_tower.patch_embed")),
        config={
            "text_config": {**SIZES, **ROUTED, **LATENT},
            "vision_config": {
                "pos_emb_height": 4, "pos_emb_width": 4, "hidden_size": 32, "intermediate_size": 64,
                "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 4,
            },
            "projection_hidden_size": 32,
        },
    ),
    "deepseek_v4": Tiny(
        model_type="deepseek_v4", base="deepseek-v4-flash", next_tokens="deepseek_v4", as_published=True, fp4=True,
        renames=((r"^model\.embed_tokens\.", "embed."), (r"^model\.hc_head\.hc_", "hc_head_"), (r"^model\.", ""),
                 (r"\.attn\.norm\.", ".attn.kv_norm.")),
        config=text(
            **INDEXER, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, num_hidden_layers=4,
            num_hash_layers=1, q_lora_rank=64, o_lora_rank=32, o_groups=2, qk_rope_head_dim=16, head_dim=64,
            intermediate_size=64, hc_mult=4, compress_ratios=[0, 4, 128, 4, 0], num_key_value_heads=1,
            sliding_window=16,
        ),
    ),
    "nemotron": Tiny(
        model_type="nemotron", tokenizer="sentencepiece", centred=True,
        config={**SIZES, "attention_bias": True, "mlp_bias": True},
    ),
    "nemotron_h": Tiny(
        model_type="nemotron_h", base="nemotron-3-nano-30b",
        config=text(
            hybrid_override_pattern="ME*E", num_hidden_layers=4, mamba_num_heads=4, mamba_head_dim=32, n_groups=2,
            ssm_state_size=32, chunk_size=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
            moe_shared_expert_intermediate_size=64,
        ),
    ),
    "nemotron_h_dense": Tiny(
        model_type="nemotron_h", base="nemotron-h-56b", as_published=True,
        config=text(
            hybrid_override_pattern="M-*-", num_hidden_layers=4, mamba_num_heads=4, mamba_head_dim=32, n_groups=2,
            ssm_state_size=32, chunk_size=16, attention_head_dim=32,
        ),
    ),
    "minimax_m2": Tiny(
        model_type="minimax_m2", base="minimax-m2.5",
        config=text(num_local_experts=4, num_experts_per_tok=2, rotary_dim=16, intermediate_size=64),
    ),
    "minimax_m3_vl": Tiny(
        model_type="minimax_m3_vl", base="minimax-m3", as_published=True,
        config={
            "text_config": text(
                intermediate_size=64, dense_intermediate_size=256, shared_intermediate_size=64, num_local_experts=4,
                num_experts_per_tok=2, rotary_dim=16, num_hidden_layers=3, moe_layer_freq=[0, 1, 1],
                sparse_attention_config={
                    "sparse_index_dim": 32, "sparse_num_index_heads": 2, "sparse_topk_blocks": 2,
                    "sparse_block_size": 16, "sparse_disable_index_value": [0, 1, 1],
                    "sparse_attention_freq": [0, 1, 1],
                },
            ),
            "vision_config": {**VISION, "projection_dim": 64}, "projector_hidden_size": 64,
        },
    ),
    "gpt_oss": Tiny(
        model_type="gpt_oss", base="gpt-oss-20b",
        config=text(num_local_experts=4, num_experts_per_tok=2, experts_per_token=2, intermediate_size=64, **SLIDING),
    ),
    "gpt_oss_mxfp4": Tiny(
        model_type="gpt_oss", base="gpt-oss-20b", mxfp4=True,
        config=text(num_local_experts=4, num_experts_per_tok=2, experts_per_token=2, intermediate_size=64, **SLIDING),
    ),
    "qwen3_vl": Tiny(
        model_type="qwen3_vl", base="qwen3-vl-2b",
        config={
            "text_config": text(rope_scaling={"mrope_interleaved": True, "mrope_section": [6, 5, 5],
                                              "rope_type": "default"}),
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_vl_moe": Tiny(
        model_type="qwen3_vl_moe", base="qwen3-vl-30b-a3b", transposed=True,
        config={
            "text_config": text(**EXPERTS, rope_scaling={"mrope_interleaved": True, "mrope_section": [6, 5, 5],
                                                         "rope_type": "default"}),
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen2_5_vl": Tiny(
        model_type="qwen2_5_vl", base="qwen2.5-vl-7b",
        config={
            **SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [0]},
        },
    ),
    "mistral3": Tiny(
        model_type="mistral3", base="mistral-small-3.2-24b",
        config={"text_config": text(), "vision_config": {**VISION, "head_dim": 16}},
    ),
    "ministral3": Tiny(model_type="ministral3", config=text()),
    "step3p7": Tiny(
        model_type="step3p7", next_tokens="step", centred=True, as_published=True,
        config={
            "architectures": ["Step3p7ForConditionalGeneration"],
            "text_config": {
                "model_type": "step3p5", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 32, "vocab_size": ROWS,
                "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6,
                                            "num_attention_groups": 2, "head_dim": 32},
                "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention",
                                *["sliding_attention"] * 3],
                "rope_theta": [5e6, 1e4, 1e4, 5e6, 1e4, 1e4, 1e4],
                "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0], "sliding_window": 16,
                "moe_layers_enum": "1,2,3", "moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 64,
                "share_expert_dim": 64, "moe_router_activation": "sigmoid", "moe_router_scaling_factor": 3.0,
                "norm_expert_weight": True, "use_moe_router_bias": True, "num_nextn_predict_layers": 3,
                "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "swiglu_limits": [0.0] * 6 + [7.0],
            },
            "vision_config": {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14},
        },
    ),
    "mimo_v2_flash": Tiny(
        model_type="mimo_v2_flash", base="mimo-v2-flash", next_tokens="mimo", as_published=True,
        config=text(
            **MIMO_LAYERS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, v_head_dim=32,
            swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_head_dim=32, swa_v_head_dim=32,
            partial_rotary_factor=0.5, sliding_window=16, sliding_window_size=16, attention_chunk_size=16,
        ),
    ),
    "lfm2": Tiny(
        model_type="lfm2", base="lfm2-1.2b",
        config={
            **SIZES, "full_attn_idxs": [1], "block_auto_adjust_ff_dim": False, "block_dim": 64, "block_ff_dim": 256,
            "conv_dim": 64, "conv_dim_out": 64, "num_heads": 4,
        },
    ),
    "lfm2_moe": Tiny(
        model_type="lfm2_moe",
        config={
            **SIZES, **EXPERTS, "num_hidden_layers": 3, "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "granite": Tiny(model_type="granite", config={**SIZES, "tie_word_embeddings": True}),
    "granitemoe": Tiny(
        model_type="granitemoe", base="granite-3.1-1b-a400m",
        config={**SIZES, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granitemoehybrid": Tiny(
        model_type="granitemoehybrid", base="granite-4.0-h-small", as_published=True,
        config={
            **SIZES, **MAMBA, "intermediate_size": 64, "shared_intermediate_size": 256, "num_local_experts": 4,
            "num_experts_per_tok": 2, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4,
        },
    ),
    "olmo2": Tiny(model_type="olmo2", base="olmo-2-7b", config=SIZES),
    "olmo3": Tiny(model_type="olmo3", config={**SIZES, **SLIDING}),
    "olmo3_yarn": Tiny(
        model_type="olmo3",
        config={
            **SIZES, "num_hidden_layers": 4, "sliding_window": 16,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512,
                "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
            },
        },
    ),
    "olmoe": Tiny(
        model_type="olmoe", base="olmoe-1b-7b",
        config={
            **SIZES, "num_key_value_heads": 4, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
        },
    ),
    "smollm3": Tiny(
        model_type="smollm3", base="smollm3-3b",
        config={**SIZES, "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1]},
    ),
    "cohere2": Tiny(model_type="cohere2", config=text(**SLIDING, head_dim=16, rotary_pct=1.0)),
    "ernie4_5": Tiny(model_type="ernie4_5", tokenizer="sentencepiece", config=text()),
    "ernie4_5_moe": Tiny(
        model_type="ernie4_5_moe", base="ernie-4.5-21b-a3b", tokenizer="sentencepiece", next_tokens="ernie",
        config={
            **SIZES, "num_hidden_layers": 3, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64,
            "moe_layer_start_index": 1, "moe_layer_end_index": 2,
        },
    ),
    "hunyuan_v1_dense": Tiny(model_type="hunyuan_v1_dense", config=text()),
    "hunyuan_v1_alpha": Tiny(
        model_type="hunyuan_v1_dense", pre="hunyuan-dense",
        config=text(
            max_position_embeddings=32768, num_experts=1, tie_word_embeddings=True,
            rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
        ),
    ),
    "hunyuan_v1_moe": Tiny(
        model_type="hunyuan_v1_moe", base="hunyuan-a13b", plain_vocabulary=True,
        config=text(num_experts=4, moe_topk=[2, 2], moe_intermediate_size=[64, 64], num_shared_expert=[1, 1],
                    intermediate_size=64),
    ),
    "phi3": Tiny(model_type="phi3", base="phi-3-mini", tokenizer="sentencepiece", config=SIZES),
    "phi3_long": Tiny(
        model_type="phi3", base="phi-3-mini", tokenizer="sentencepiece",
        config={**SIZES, "rope_scaling": LONGROPE, "max_position_embeddings": 131072},
    ),
    "phimoe": Tiny(
        model_type="phimoe", base="phi-tiny-moe", tokenizer="sentencepiece",
        config={
            **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "head_dim": 16,
            "rope_scaling": {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.2},
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        },
    ),
    "exaone4": Tiny(
        model_type="exaone4",
        config={**SIZES, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "exaone4_windows": Tiny(
        model_type="exaone4",
        config={
            **SIZES, "num_hidden_layers": 64, "sliding_window": 16, "sliding_window_pattern": "LLLG",
            "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    "starcoder2": Tiny(model_type="starcoder2", config=SIZES),
    "falcon_h1": Tiny(
        model_type="falcon_h1", base="falcon-h1-7b",
        config=text(
            **MAMBA, mamba_d_ssm=128, mamba_n_heads=4, attention_in_multiplier=1.5, attention_out_multiplier=0.9375,
            key_multiplier=0.7, embedding_multiplier=5.656854249492381, lm_head_multiplier=0.0390625,
            mlp_multipliers=[0.8838834764831844, 0.58], ssm_in_multiplier=1.25, ssm_out_multiplier=0.3,
            ssm_multipliers=[0.35, 0.25, 0.17, 0.5, 0.11],
        ),
    ),
    "jamba": Tiny(
        model_type="jamba", base="jamba-mini", tokenizer="sentencepiece",
        config={
            **SIZES, "num_hidden_layers": 4, "num_experts": 4, "attn_layer_offset": 1, "attn_layer_period": 3,
            "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 32, "mamba_d_state": 16,
        },
    ),
    "mamba2": Tiny(
        model_type="mamba2", base="mamba2-codestral-7b",
        config={
            "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "state_size": 32,
            "n_groups": 2, "vocab_size": ROWS, "chunk_size": 16,
        },
    ),
    "llama4": Tiny(
        model_type="llama4", base="llama-4-maverick",
        config={
            "text_config": text(
                num_hidden_layers=4, num_local_experts=4, intermediate_size=64, intermediate_size_mlp=256,
                interleave_moe_layer_step=2, use_qk_norm=True,
            ),
            "vision_config": {
                **VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
            },
        },
    ),
    "bert": Tiny(
        model_type="bert", base="gte-small", tokenizer="wordpiece", pre="jina-v2-en",
        config={**ENCODER, "max_position_embeddings": 64},
    ),
    "roberta": Tiny(
        model_type="roberta", base="roberta-base", tokenizer="bpe_roberta",
        config={**ENCODER, "architectures": ["RobertaModel"], "max_position_embeddings": 66},
    ),
    "xlm-roberta": Tiny(
        model_type="xlm-roberta", base="bge-m3", tokenizer="unigram",
        config={**ENCODER, "max_position_embeddings": 66},
    ),
    "modernbert": Tiny(
        model_type="modernbert", tokenizer="bpe_roberta",
        config={**ENCODER, "num_hidden_layers": 4, "max_position_embeddings": 64, "local_attention": 16},
    ),
    "seed_oss": Tiny(model_type="seed_oss", config=text()),
    "internlm2": Tiny(model_type="internlm2", base="internlm2-7b", tokenizer="sentencepiece", config=SIZES),
    "llama": Tiny(
        model_type="llama", base="llama-3.1-8b", config={**SIZES},
    ),
    "mistral": Tiny(model_type="mistral", base="mistral-7b-v0.1", tokenizer="sentencepiece", config=text()),
    "mixtral": Tiny(
        model_type="mixtral", base="mixtral-8x7b", tokenizer="sentencepiece", config={**SIZES, "num_local_experts": 4},
    ),
    "qwen2": Tiny(model_type="qwen2", base="qwen2.5-3b", config=SIZES),
    "qwen2_moe": Tiny(
        model_type="qwen2_moe",
        config={
            **SIZES, **EXPERTS, "shared_expert_intermediate_size": 64, "num_hidden_layers": 3, "mlp_only_layers": [],
        },
    ),
    "qwen3": Tiny(model_type="qwen3", base="qwen3-0.6b", config=text()),
    "qwen3_moe": Tiny(model_type="qwen3_moe", base="qwen3-30b-a3b", config=text(**EXPERTS)),
}  # fmt: skip
