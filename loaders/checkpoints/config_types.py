"""The types of what a config.json says: looked at once, when it is read, and trusted by everything that uses it.

A key means the same wherever it stands: at the top, in the config of a part (text_config, vision_config), or in the
block of a quantization. Keys that nothing here reads may hold anything; null stands for a key that is absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.limits import CONFIG_DEPTH, CONFIG_LAYERS, CONFIG_NUMBER, SHOWN_CHARACTERS, shown
from loaders.words import LINE_BREAK

FLOAT32_MAX = (2 - 2**-23) * 2.0**127  # what engines, and GGUF's metadata, hold of a number
Check = Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= CONFIG_NUMBER


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (type(value) is float and (math.isinf(value) or abs(value) <= FLOAT32_MAX))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or value in (0, 1)


def _is_text(value: Any) -> bool:
    """What is shown, and compared with words of one line."""
    return isinstance(value, str) and not LINE_BREAK.search(value)


def _is_block(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_count_of_layers(value: Any) -> bool:
    return type(value) is int and 0 <= value <= CONFIG_LAYERS


def _each(check: Check) -> Check:
    """Of one value, or of a list with one for each layer, where a layer may have none."""
    return lambda value: check(value) or _list(check)(value)


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list | tuple) and all(item is None or check(item) for item in value)


def _any(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _rows(check: Check, what: str, keys: str) -> Iterable[tuple[str, tuple[Check, str]]]:
    return ((key, (check, what)) for key in keys.split())


TYPES: dict[str, tuple[Check, str]] = dict(
    (
        *_rows(
            _is_count_of_layers, f"a whole number from 0 to {CONFIG_LAYERS}", "num_hidden_layers n_layer num_layers"
        ),
        *_rows(
            _each(_is_whole),
            "a whole number",
            """hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size n_embd n_head
            max_position_embeddings max_window_layers num_local_experts num_experts num_experts_per_tok n_routed_experts
            moe_intermediate_size shared_expert_intermediate_size n_group topk_group n_shared_experts v_head_dim
            qk_rope_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank sliding_window
            num_attention_groups num_kv_shared_layers swa_num_key_value_heads linear_value_head_dim
            linear_num_value_heads linear_num_key_heads linear_key_head_dim linear_conv_kernel_dim mamba_d_state
            mamba_d_ssm mamba_n_groups mamba_n_heads mamba_d_head mamba_d_conv type_vocab_size decoder_sparse_step
            first_k_dense_replace interleave_moe_layer_step no_rope_layer_interval full_attention_interval
            global_attn_every_n_layers attn_layer_period attn_layer_offset expert_layer_period expert_layer_offset
            block_multiple_of moe_num_shared_experts hc_mult num_nextn_predict_layers bits w_bit num_bits q_group_size
            bos_token_id eos_token_id pad_token_id unk_token_id eod_token_id""",
        ),
        # EXAONE's patterns are letters, one for each layer of a turn.
        *_rows(_each(_any(_is_whole, _is_text)), "a whole number", "group_size sliding_window_pattern"),
        *_rows(
            _each(_is_number),
            "a number that float32 holds",
            """rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps layernorm_epsilon rope_theta swa_rope_theta
            rope_local_base_freq partial_rotary_factor rotary_pct swiglu_limit query_pre_attn_scalar
            attn_logit_softcapping final_logit_softcapping routed_scaling_factor embedding_multiplier
            residual_multiplier attention_multiplier logits_scaling original_max_position_embeddings
            block_ffn_dim_multiplier""",
        ),
        *_rows(
            _is_flag,
            "true or false",
            """tie_word_embeddings use_sliding_window mlp_bias attention_bias use_qk_norm use_double_wide_mlp no_bias
            norm_topk_prob is_encoder_decoder mamba_rms_norm mamba_norm_before_gate is_marlin_format desc_act
            zero_point block_auto_adjust_ff_dim""",
        ),
        *_rows(
            _is_text,
            "a text",
            """model_type quant_method quant_algo checkpoint_format packing_format kv_cache_quant_algo
            quantization_method topk_method scoring_func hidden_act mode""",
        ),
        # In MLX's blocks it is a module's name, with its settings.
        *_rows(_any(_is_flag, _is_block), "true or false", "lm_head"),
        *_rows(_any(_is_text, _is_block), "a text", "torch_dtype dtype"),
        *_rows(lambda value: value in ("bitlinear", "autobitlinear"), "bitlinear or autobitlinear", "linear_class"),
        *_rows(
            _list(_is_text),
            "a list of texts",
            "architectures layer_types mlp_layer_types ignore modules_to_not_convert llm_int8_skip_modules targets"
            " exclude_modules indexer_types",
        ),
        *_rows(
            _list(_is_whole),
            "a list of whole numbers",
            "full_attn_idxs mlp_only_layers weight_block_size mrope_section block_structure",
        ),
        *_rows(
            _is_block,
            "an object",
            "text_config vision_config audio_config quantization_config quantization id2label config_groups"
            " sparsity_config quantized_layers extra_config",
        ),
        *_rows(_any(_is_block, _is_text), "an object", "weights input_activations output_activations"),
    )
)


# Blocks in which keys mean what they do at the top, and those of quantizations, whose inner blocks are theirs, too.
PARTS, QUANTIZATIONS = (
    ("rope_scaling", "rope_parameters"),
    ("quantization", "quantization_config", "compression_config"),
)


def check_config(config: Mapping[str, Any], file: str) -> None:
    """Check the types of what a config says, of its parts and of the block of its quantization.

    Raises:
        BadCheckpoint: a value is of another type, or larger than anything in use.
    """
    _check(config, file, "", CONFIG_DEPTH)


def _check(block: Mapping[str, Any], file: str, within: str, levels: int, is_quantization: bool = False) -> None:
    if not levels:
        raise BadCheckpoint(f"{file}: objects in one another deeper than {CONFIG_DEPTH} are not read")
    for key, value in block.items():
        row = TYPES.get(key)
        if row is not None and value is not None and not row[0](value):
            raise BadCheckpoint(
                f"{file}: expected {row[1]} as {within}{key}, found {shown(value)}; correct it, or fetch the file again"
            )
        # Elsewhere keys are words of the model's own: labels may be called "ignore".
        inside = is_quantization or key in QUANTIZATIONS
        if inside or key in PARTS or key.endswith("_config"):
            for inner in value if isinstance(value, list | tuple) else (value,):
                if isinstance(inner, Mapping):
                    _check(inner, file, f"{within}{shown(key)[1:-1]}."[:SHOWN_CHARACTERS], levels - 1, inside)
