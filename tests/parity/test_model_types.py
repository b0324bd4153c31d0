"""Models of types that no family knows: quantized by the meanings of their names, loaded and run by the engine.

Each is a tiny random model of its real class. What is quantized by bitsandbytes computes the same logits as the model
that transformers quantizes itself; what compressed-tensors holds, the same as the weights it decodes to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from loaders.backends.machine import has_avx512_bf16  # noqa: E402

pytestmark = pytest.mark.engine

USUAL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
TYPES: dict[str, dict[str, Any]] = {
    "smollm3": {},
    "granite": {"tie_word_embeddings": True},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {},
    "cohere2": {"layer_types": ["full_attention", "sliding_attention"]},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_intermediate_size": 64, "moe_k": 2, "moe_num_shared_experts": 1},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "glm4": {},
    "glm4_moe": {**EXPERTS, **ROUTED},
    "glm_moe_dsa": {
        **EXPERTS, **ROUTED, **LATENT, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 8, "head_dim": 32,
        "indexer_types": ["full", "full"], "num_key_value_heads": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {
        **EXPERTS, "shared_expert_intermediate_size": 64, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    },
    "olmo2": {},
    "olmo3": {"layer_types": ["full_attention", "sliding_attention"]},
    "exaone4": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    "seed_oss": {},
    "starcoder2": {},
    "phi": {},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "dots1": {**EXPERTS, **ROUTED, "layer_types": ["full_attention", "full_attention"]},
    "nemotron": {},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0,
                    "global_head_dim": 16, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 160},
}  # fmt: skip


def made(model_type: str, folder: Path) -> None:
    """Save a random model of a type."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**USUAL, **TYPES[model_type]})
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # what the classes leave uninitialized, too
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


def loaded(folder: Path, **settings: Any) -> Any:
    """Load a model, of which nothing may be missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, dtype=torch.bfloat16, output_loading_info=True, **settings
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model: Any) -> Any:
    ids = torch.randint(3, 160, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def difference(one: Any, other: Any) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("model_type", TYPES)
def test_bitsandbytes_computes_what_its_own_quantization_does(model_type: str, tmp_path: Path, weightmill: Any) -> None:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    made(model_type, tmp_path / "source")
    ran = weightmill("run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", "quant=nf4",
                     "quant.double_quant=false", "tracking=none")  # fmt: skip
    assert ran.status == 0, ran.err
    ours = loaded(tmp_path / "out")
    skip = ours.config.quantization_config.llm_int8_skip_modules
    theirs = loaded(
        tmp_path / "source",
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skip,
        ),
    )  # fmt: skip
    quantized = {name: module for name, module in ours.named_modules() if type(module).__name__ == "Linear4bit"}
    wanted = {name: module for name, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"}
    assert set(quantized) == set(wanted)
    assert quantized
    for name, module in quantized.items():
        values = [dequantize_bnb_weight(m.weight, m.weight.quant_state) for m in (module, wanted[name])]
        assert torch.equal(*values), name
    if not has_avx512_bf16():  # there its own kernel refuses some shapes: see Limits in the README
        assert torch.equal(logits(ours), logits(theirs))


# Types of which transformers has no such layers, or reads experts in stacks only.
NOT_LOADED = ("gpt2", "granitemoe")


@pytest.mark.parametrize("model_type", [each for each in TYPES if each not in NOT_LOADED])
def test_compressed_tensors_computes_what_its_weights_decode_to(
    model_type: str, tmp_path: Path, weightmill: Any
) -> None:
    made(model_type, tmp_path / "source")
    for settings in (["quant=w4a16", "quant.group_size=32"],):
        out, plain = tmp_path / "out", tmp_path / "plain"
        ran = weightmill("run", f"model.path={tmp_path / 'source'}", f"output.path={out}", "tracking=none", *settings)
        assert ran.status == 0, ran.err
        ran = weightmill("run", f"model.path={out}", f"output.path={plain}", "quant=none", "quant.dtype=bfloat16",
                         "tracking=none")  # fmt: skip
        assert ran.status == 0, ran.err
        ours, decoded = logits(loaded(out)), logits(loaded(plain))
        assert bool(torch.isfinite(ours).all())
        assert difference(ours, decoded) < 0.02
