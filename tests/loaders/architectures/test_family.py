"""Roles, blocks and groups, held against the names that transformers itself gives."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.architectures.family import FAMILIES, ROLES, family_of, natural_key

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {"attention_bias": True}),
    "mistral": ("Mistral", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 2}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 8}),
}

MLA: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 1, "topk_group": 1, "moe_intermediate_size": 16, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
MODELS |= {
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                               "shared_expert_intermediate_size": 16}),
    "deepseek_v3": ("DeepseekV3", {**MLA, "n_group": 2, "q_lora_rank": 16}),
    "deepseek_v2": ("DeepseekV2", {**MLA, "n_group": 1, "q_lora_rank": None}),
    "gpt_oss": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8}),
    "gemma3_text": ("Gemma3", {"head_dim": 8}),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "llama4_text": ("Llama4", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
                               "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}),
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def text_model(model_type: str) -> Any:
    """A small causal model of a type, with random weights."""
    transformers = pytest.importorskip("transformers")
    prefix, extra = MODELS[model_type]
    name = f"{prefix}TextConfig" if model_type.endswith("_text") else f"{prefix}Config"
    return getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, name)(**{**SIZES, **extra}))


def saved_names(model: Any, folder: Any) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.engine
@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_a_family_names_every_tensor_of_its_causal_model(model_type: str, tmp_path: Any) -> None:
    model = text_model(model_type)
    family = family_of({"model_type": model_type})
    linear = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear"}
    for name, shape in saved_names(model, tmp_path).items():
        assert any(row[0].search(name) for row in family.tensors), name
        role = family.traits(name, shape).role
        assert role in ROLES
        if name.endswith("shared_expert_gate.weight"):  # a router, though transformers makes it a linear layer
            assert role == "router"
        elif ".experts." not in name:
            assert (name in linear) == (role in ("attention", "mlp", "linear", "head")), (name, role)


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["gemma3", "llama4"])
def test_a_model_with_a_tower_is_named_through_and_through(kind: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "gemma3":
        vision = {**VISION, "vision_use_head": False}
        config = transformers.Gemma3Config(text_config={**SIZES, "head_dim": 8}, vision_config=vision,
                                           mm_tokens_per_image=4)  # fmt: skip
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        sizes = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
        text = {**SIZES, **MODELS["llama4_text"][1]}
        config = transformers.Llama4Config(text_config=text, vision_config={**VISION, **sizes})
        model = transformers.Llama4ForConditionalGeneration(config)
    family, roles = family_of({"model_type": kind}), {}
    for name, shape in saved_names(model, tmp_path).items():
        assert any(row[0].search(name) for row in family.tensors), name
        roles[name] = family.traits(name, shape).role
    linear = sum(type(module).__name__ == "Linear" for module in model.modules())
    found = sum(role in ("attention", "mlp", "head", "vision") for role in roles.values())
    assert found == linear - (kind == "gemma3")  # its head is tied and not saved
    assert {role for name, role in roles.items() if "q_proj.weight" in name} == {"attention", "vision"}


@pytest.mark.engine
@pytest.mark.parametrize(
    "kind", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForPreTraining"]
)
def test_the_bert_family_names_every_tensor(kind: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    model = getattr(transformers, kind)(transformers.BertConfig(**sizes))
    family = family_of({"model_type": "bert"})
    linear = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear"}
    for name, shape in saved_names(model, tmp_path).items():
        role = family.traits(name, shape).role
        assert role != "other" or len(shape) < 2, name
        assert (name in linear) == (role in ("attention", "mlp", "linear", "head")), (name, role)


@pytest.mark.quick
def test_every_family_is_held_against_transformers() -> None:
    apart = {"bert"}  # which has tests of its own
    missing = [f.name for f in FAMILIES if not {*f.model_types} & {*MODELS, *apart}]
    assert not missing, "a small model of each family in MODELS"


@pytest.mark.engine
def test_what_is_tied_by_default_is_what_transformers_ties() -> None:
    transformers = pytest.importorskip("transformers")
    for family in FAMILIES:
        for model_type in family.model_types:
            if model_type != "kimi_k2":  # of which transformers has the class, DeepseekV3ForCausalLM, but not the type
                assert family.ties == transformers.AutoConfig.for_model(model_type).tie_word_embeddings


@pytest.mark.quick
def test_fused_partners_share_a_group_and_a_block() -> None:
    llama = family_of({"model_type": "llama"})
    traits = [llama.traits(f"model.layers.3.self_attn.{p}_proj.weight", (8, 8)) for p in "qkv"]
    assert len(set(traits)) == 1
    assert traits[0].group is not None
    moe = family_of({"model_type": "qwen3_moe"})
    experts = [moe.traits(f"model.layers.0.mlp.experts.{e}.gate_proj.weight", (8, 8)) for e in range(2)]
    assert experts[0].block == experts[1].block == moe.traits("model.layers.0.mlp.gate.weight", (2, 8)).block
    assert experts[0].group != experts[1].group
    assert moe.traits("model.layers.0.mlp.gate.weight", (2, 8)).role == "router"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("transformer.wte.weight", (10, 4), "embedding"),
        ("transformer.h.0.attn.c_proj.weight", (4, 4), "linear"),
        ("transformer.h.0.ln_1.weight", (4,), "norm"),
        ("model.layers.0.block_sparse_moe.gate.weight", (2, 4), "router"),
        ("model.layers.0.mlp.gate_proj.weight", (8, 4), "linear"),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 8, 4), "other"),
        ("encoder.conv1.weight", (4, 4, 3), "conv"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (4, 4), "expert"),
        ("lm_head.weight", (10, 4), "head"),
        ("x.bias", (4,), "bias"),
    ],
)
def test_the_generic_family_goes_by_names(name: str, shape: tuple[int, ...], role: str) -> None:
    family = family_of({"model_type": "something_new"})
    assert family.is_generic
    assert family.traits(name, shape).role == role


def test_layers_sort_by_number() -> None:
    assert sorted(["layers.10", "layers.9", "layers.2.a"], key=natural_key) == ["layers.2.a", "layers.9", "layers.10"]
