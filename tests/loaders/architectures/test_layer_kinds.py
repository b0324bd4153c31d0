"""The kinds of layers in hybrids' configs, and families whose sections are like another's."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.architectures import family_files
from loaders.architectures.gguf import architecture_of
from loaders.architectures.layer_kinds import all_attention, layer_count, layer_kinds, without_experts
from loaders.errors import BadSpec
from loaders.layouts.gguf.keys.by_layer import attention_layers, mimo_layers, step_layers

pytestmark = pytest.mark.quick

SAID: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"hybrid_override_pattern": "ME*-"}, ("recurrent", "moe", "attention", "mlp")),
    ({"layers_block_type": ["linear_attention", "moe", "full_attention"]}, ("recurrent", "moe", "attention")),
    ({"layer_types": ["mamba", "attention"]}, ("recurrent", "attention")),
    ({"full_attn_idxs": [1], "num_hidden_layers": 3}, ("convolution", "attention", "convolution")),
    ({"num_hidden_layers": 3}, ()),
]


@pytest.mark.parametrize(("config", "kinds"), SAID)
def test_every_word_for_a_kind_is_known(config: dict[str, Any], kinds: tuple[str, ...]) -> None:
    assert layer_kinds(config) == kinds
    assert layer_count(config) == (len(kinds) or 3)


@pytest.mark.parametrize("config", [{"layer_types": ["attention", "mystery"]}, {"hybrid_override_pattern": 7},
                                    {"layer_types": ["attention"], "num_hidden_layers": 2}])  # fmt: skip
def test_a_kind_that_is_not_known_or_missing_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(BadSpec, match="kinds of"):
        layer_kinds(config)


def test_a_hybrid_in_name_only_is_another_architecture() -> None:
    config = {"model_type": "granitemoehybrid", "num_hidden_layers": 2, "num_local_experts": 4}
    assert architecture_of({**config, "layer_types": ["mamba", "attention"]}).name == "granitehybrid"
    assert architecture_of({**config, "layer_types": ["attention"] * 2}).name == "granitemoe"
    assert all_attention({"layer_types": ["full_attention"]})
    assert without_experts({"hybrid_override_pattern": "M*-"})
    assert architecture_of({"model_type": "nemotron_h", "hybrid_override_pattern": "M*-"}).name == "nemotron_h"
    assert architecture_of({"model_type": "nemotron_h", "hybrid_override_pattern": "M*E"}).name == "nemotron_h_moe"


def test_a_section_that_is_like_anothers_has_its_own_keys_and_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    first = "model_types: [one]\ngguf: {architecture: a, made: [x], keys: {k: 1, l: 2}, next_tokens: true}\n"
    second = "model_types: [two]\ngguf: {like: one, architecture: b, add: {made: [y], keys: {l: 3}}}\n"
    monkeypatch.setattr(family_files, "_texts", lambda: {"one": first, "two": second})
    family_files.section.cache_clear()
    try:
        assert family_files.section("two", "gguf") == {
            "architecture": "b", "made": ["x", "y"], "keys": {"k": 1, "l": 3}, "next_tokens": True,
        }  # fmt: skip
        assert family_files.section("two", "mlx") is None
    finally:
        family_files.section.cache_clear()


# --- keys with a value for each layer


def test_layers_without_attention_have_no_heads_of_keys() -> None:
    found = attention_layers(
        {"layer_types": ["mamba", "attention"], "num_attention_heads": 8, "num_key_value_heads": 4}
    )
    assert found["attention.head_count_kv"] is not None
    assert list(found["attention.head_count_kv"].value) == [0, 4]


STEP: dict[str, Any] = {
    "num_hidden_layers": 2, "block_count": 3, "num_attention_heads": 4, "num_attention_groups": 2,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "rope_theta": [5e6, 1e4, 1e4],
    "partial_rotary_factors": [0.5, 1.0, 1.0], "attention_other_setting": {"num_attention_heads": 6},
}  # fmt: skip


def test_layers_for_multi_token_prediction_are_counted() -> None:
    found = step_layers(STEP)
    assert found["attention.head_count"] is not None
    assert list(found["attention.head_count"].value) == [4, 6, 6]
    mimo = mimo_layers({"block_count": 3, "hybrid_layer_pattern": [0, 1], "num_key_value_heads": 2,
                        "swa_num_key_value_heads": 4})  # fmt: skip
    assert mimo["attention.head_count_kv"] is not None
    assert list(mimo["attention.head_count_kv"].value) == [2, 4, 4]


REFUSED = [
    ({"partial_rotary_factors": [0.5, 0.5, 1.0]}, "rotates half a head"),
    ({"rope_theta": [5e6, 1e4, 5e6]}, "one rope_theta for each kind"),
    ({"rope_theta": 5e6}, "expected a list as rope_theta"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope scaling .* is not converted"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED)
def test_what_llama_cpp_computes_otherwise_of_step_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BadSpec, match=why):
        step_layers(STEP | changes)
