"""Merged adapters against peft: its merge_and_unload of the base in float32, rounded once to the base's dtype.

Where both have the same float32 sum, the weights are the same bytes. peft's norms for DoRA, and its products beyond a
rank of 192, add up in an order that depends on its libraries: such a sum may be off by its last bits, and the rounded
weight by one step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.engine,
    # peft says that merged embeddings are no longer tied, that it saves embeddings which are targeted, and more.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"),
]
TARGETS = ["q_proj", "v_proj", "down_proj", "gate_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
MOE = {**SIZES, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
GPT_OSS = {**SIZES, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
# (prefix of the model's class, its config, the adapter's settings)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rslora": ("Llama", SIZES, {"r": 8, "lora_alpha": 13, "use_rslora": True}),
    "patterns": ("Llama", SIZES, {
        "r": 8, "lora_alpha": 13, "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, ".*v_proj": 7},
    }),
    "dora": ("Llama", SIZES, {"use_dora": True}),
    "one layer": ("Llama", SIZES, {"layers_to_transform": [1]}),
    "biases": ("Llama", {**SIZES, "attention_bias": True}, {"bias": "all"}),
    "biases of B": ("Llama", {**SIZES, "attention_bias": True}, {"lora_bias": True, "target_modules": ["q_proj"]}),
    "modules_to_save": ("Llama", SIZES, {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]}),
    "embeddings": ("Llama", SIZES, {"target_modules": ["embed_tokens", "lm_head"]}),
    "dora of embeddings": ("Llama", SIZES, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tokens": ("Llama", SIZES, {"trainable_token_indices": [1, 5, 127]}),
    "tied embeddings": ("Llama", {**SIZES, "tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}),
    "tied head": ("Llama", {**SIZES, "tie_word_embeddings": True}, {"target_modules": ["lm_head"]}),
    "saved tied head": ("Llama", {**SIZES, "tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}),
    "saved tied embeddings": ("Llama", {**SIZES, "tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
    "tokens of tied": ("Llama", {**SIZES, "tie_word_embeddings": True}, {"trainable_token_indices": [1, 5]}),
    "Conv1D": ("GPT2", GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "dora of Conv1D": ("GPT2", GPT2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "experts one by one": ("Qwen3Moe", MOE, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts stacked": ("GptOss", GPT_OSS, {
        "target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2},
    }),
}  # fmt: skip


def random(model: Any, std: float) -> None:
    for name, value in model.named_parameters():
        if "lora_magnitude" in name:
            value.data.mul_(1 + 0.1 * torch.rand_like(value))
        elif value.requires_grad:
            value.data.normal_(0, std)


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_sum_is_pefts(case: str, tmp_path: Path, weightmill: Callable[..., Any]) -> None:
    prefix, sizes, settings = CASES[case]
    kind = getattr(transformers, "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM")
    torch.manual_seed(0)
    base = kind(getattr(transformers, f"{prefix}Config")(**sizes)).to(torch.bfloat16)
    random(base, 0.05)
    base.save_pretrained(tmp_path / "base")
    base.float().save_pretrained(tmp_path / "wide")
    load = lambda: kind.from_pretrained(tmp_path / "base", dtype=torch.float32)  # noqa: E731
    trained = peft.get_peft_model(load(), peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, **settings}))
    random(trained, 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    wanted = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").merge_and_unload()
    ours = {}
    for name in ("base", "wide"):
        ran = weightmill(
            "run", f"model.path={tmp_path / name}", "transform=merge_lora", f"transform.path={tmp_path / 'adapter'}",
            "quant=none", f"output.path={tmp_path / 'out' / name}",
        )  # fmt: skip
        assert ran.status == 0, ran.err
        loaded, info = kind.from_pretrained(tmp_path / "out" / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.config.tie_word_embeddings == wanted.config.tie_word_embeddings
        ours[name] = loaded.state_dict()
    assert set(ours["base"]) == set(wanted.state_dict())
    for name, sums in wanted.state_dict().items():
        one, other, wide = ours["base"][name], sums.to(torch.bfloat16), ours["wide"][name]
        assert (one.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(wide, sums, rtol=1e-6, atol=1e-7, msg=name)
        assert torch.equal(one, wide.to(torch.bfloat16)), name
        steps = (one.view(torch.int16).int() - other.view(torch.int16).int()).abs()
        assert steps.max() <= 1, name
        assert not ((steps > 0) & (wide == sums)).any(), name
