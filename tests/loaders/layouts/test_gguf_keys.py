"""What a GGUF says of windows, rotary embeddings and experts, and what llama.cpp would compute otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loaders.architectures.family_files import known_types, section
from loaders.architectures.gguf import architecture_of, completed
from loaders.errors import BadSpec
from loaders.layouts.gguf.keys.architecture import MADE
from loaders.layouts.gguf.keys.checks import CHECKS
from loaders.layouts.gguf.metadata import model_metadata, not_computed
from loaders.tensors.form_views import grouped_heads

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768, "vocab_size": 320,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN_IN_WINDOWS = {"full_attention": {"rope_theta": 500000.0}, "sliding_attention": {"rope_type": "yarn"}}
HUNYUAN = {"num_experts": 4, "moe_topk": [2] * 4, "moe_intermediate_size": 64, "num_shared_expert": [1] * 4}


def keys(model_type: str, **config: Any) -> dict[str, Any]:
    """Return the values of an architecture's keys, without its name."""
    whole = completed({**SIZES, "model_type": model_type, **config})
    found = model_metadata(architecture_of(whole), whole)
    plain = {key.partition(".")[2]: entry.value for key, entry in found.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


@pytest.mark.quick
@pytest.mark.parametrize(("key", "known"), [("made", MADE), ("checks", CHECKS)])
def test_every_word_of_a_family_is_a_function_and_every_function_a_word(key: str, known: dict[str, Any]) -> None:
    sections = [section(model_type, "gguf") or {} for model_type in known_types("gguf")]
    sections += [changes for each in sections for changes in each.get("variants", {}).values()]
    assert {word for each in sections for word in each.get(key, ())} == {*known}


def test_windows_are_in_all_but_the_last_of_every_four_layers_or_as_config_json_says() -> None:
    pattern = "attention.sliding_window_pattern"
    assert keys("olmo3", sliding_window=16)[pattern] == [True, True, True, False]
    assert keys("cohere2", sliding_window_pattern=2)[pattern] == [True, False, True, False]
    kinds = ["full_attention", "sliding_attention"] * 2
    assert keys("olmo3", sliding_window=16, layer_types=kinds)[pattern] == [False, True, False, True]
    deep = keys("exaone4", num_hidden_layers=64, sliding_window=16, sliding_window_pattern="LLLG")
    assert deep[pattern] == [True, True, True, False] * 16
    assert pattern not in keys("olmo2")
    assert pattern not in keys("exaone4", sliding_window=None)


@pytest.mark.parametrize(("model_type", "config", "is_told"), [
    ("seed_oss", {"sliding_window": 16}, True),
    ("mistral3", {"sliding_window": 16}, True),
    ("qwen3_vl_moe", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, True),
    ("phimoe", {"sliding_window": 16}, True),  # which is written, and not read
    ("seed_oss", {"sliding_window": None}, False),
    ("seed_oss", {"sliding_window": 32768}, False),
    ("seed_oss", {"sliding_window": 16, "use_sliding_window": False}, False),
    ("seed_oss", {"sliding_window": 16, "max_window_layers": 4}, False),
    ("seed_oss", {"sliding_window": 16, "layer_types": ["full_attention"] * 4}, False),
    ("olmo3", {"sliding_window": 16}, False),
    ("llama", {"sliding_window": 16}, False),
])  # fmt: skip
def test_a_window_that_llama_cpp_does_not_compute_is_told(
    model_type: str, config: dict[str, Any], is_told: bool
) -> None:
    whole = completed({**SIZES, "model_type": model_type, **config})
    architecture = architecture_of(whole)
    said = not_computed(architecture, whole, model_metadata(architecture, whole))
    assert any("sliding window" in each for each in said) == is_told


def test_hunyuans_dynamic_scaling_is_another_base() -> None:
    found = keys("hunyuan_v1_dense", head_dim=128, rope_scaling={"type": "dynamic", "alpha": 1000.0})
    assert found["rope.freq_base"] == pytest.approx(11158839.9251)
    assert (found["rope.scaling.type"], found["context_length"]) == ("none", 262144)
    assert keys("hunyuan_v1_dense")["context_length"] == 32768


def test_widths_of_experts_are_said_once() -> None:
    found = keys("hunyuan_v1_moe", **HUNYUAN)
    assert [found[f"expert_{key}"] for key in ("used_count", "shared_count", "feed_forward_length")] == [2, 1, 64]
    shared = {"moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2}
    assert keys("ernie4_5_moe", moe_num_shared_experts=3, **shared)["expert_shared_feed_forward_length"] == 96
    assert "expert_shared_feed_forward_length" not in keys("ernie4_5_moe", moe_num_shared_experts=0, **shared)


@pytest.mark.parametrize(("model_type", "config", "message"), [
    ("olmo2", {"tie_word_embeddings": True}, "no OLMo 2 without a head of its own; tie_word_embeddings is true"),
    ("olmo2", {"head_dim": 32}, "takes hidden_size / heads, 16, for head_dim 32"),
    ("olmo2", {"rope_scaling": LLAMA3}, "default or linear or yarn as rope_type"),
    ("olmo3", {"layer_types": ["sliding_attention"] * 4}, "expected its size as sliding_window"),
    ("olmo3", {"rope_parameters": YARN_IN_WINDOWS}, "sliding_attention with default"),
    ("olmoe", {"num_key_value_heads": 2}, "as many heads of keys as of queries, 4; there are 2"),
    ("olmoe", {"norm_topk_prob": True}, "never normalizes the weights of OLMoE's experts"),
    ("olmoe", {"clip_qkv": 8.0}, "does not clip OLMoE's queries"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, r"every 4th layer unrotated.*is \[1, 0, 1, 0\]"),
    ("smollm3", {"no_rope_layer_interval": 2}, "every 4th layer unrotated"),
    ("smollm3", {"use_sliding_window": True}, "no window for SmolLM3"),
    ("cohere2", {"rotary_pct": 0.5}, "rotary_pct is 0.5 here"),
    ("cohere2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "writes no rope scaling.*'linear'"),
    ("cohere2", {"sliding_window_pattern": "LXG"}, "letters L and G as sliding_window_pattern, found 'LXG'"),
    ("ernie4_5", {"use_bias": True}, "no biases of attention's output and of MLPs"),
    ("ernie4_5_moe", {"moe_layer_end_index": 2, "moe_intermediate_size": 32}, "moe_layer_end_index is 2"),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, "every layer after the dense ones for a mixture"),
    ("hunyuan_v1_dense", {"num_experts": 8}, "takes this type for one without experts"),
    ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "expected alpha"),
    ("hunyuan_v1_moe", {**HUNYUAN, "moe_topk": [1, 2]}, r"one moe_topk for all layers, found \[1, 2\]"),
    ("hunyuan_v1_moe", {**HUNYUAN, "moe_topk": [{}]}, "expected a whole number as moe_topk"),
    ("hunyuan_v1_moe", {**HUNYUAN, "moe_intermediate_size": 32}, "moe_intermediate_size is 32"),
    ("exaone4", {"sliding_window": 16}, "with windows if it has 64 layers.*it has 4 here"),
    ("exaone4", {"sliding_window": None, "num_hidden_layers": 64}, "it has 64 here, and sliding_window None"),
    ("exaone4", {}, "expected sliding_window, which is null"),
    ("starcoder2", {"hidden_act": "gelu"}, "computes starcoder2 with gelu_pytorch_tanh, not with gelu"),
    ("seed_oss", {"attention_out_bias": True}, "no bias of attention's output"),
    ("internlm2", {"bias": True}, "no biases for InternLM 2"),
    ("dots1", {"num_key_value_heads": 2}, "as many heads of keys as of queries, 4; there are 2"),
    ("dots1", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}, "without windows"),
    ("dots1", {"sliding_window": 16, "max_window_layers": 1}, "without windows"),
    ("nemotron", {"hidden_act": "silu"}, "computes nemotron with relu2, not with silu"),
])  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    model_type: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadSpec, match=message):
        keys(model_type, **config)


def test_queries_keys_and_values_are_cut_out_of_groups() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    whole = np.arange(16 * 3, dtype=np.int8).reshape(16, 3)  # two groups of two queries, a key and a value of two rows
    rows = [piece.view.reshape(piece.shape)[:, 0] // 3 for piece in grouped_heads(whole, config)]
    assert [list(found) for found in rows] == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
