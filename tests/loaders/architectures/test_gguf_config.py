"""config.json from the metadata of a GGUF, and what of it config.json has no place for."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.architectures.gguf_config import config_of, faults, left_out

NAMES = ["token_embd.weight", "output.weight", "blk.0.attn_q.weight"]


def metadata(architecture: str = "llama", **more: Any) -> dict[str, Any]:
    sizes = {
        "block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 16, **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in sizes.items()},
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_every_token_that_ends_a_text_is_an_eos() -> None:
    assert config_of(metadata(), NAMES, "float16")["eos_token_id"] == 2
    several = metadata() | {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 4}
    assert config_of(several, NAMES, "float16")["eos_token_id"] == [2, 5, 4]


def test_a_value_a_layer_is_one_value_if_all_are_the_same() -> None:
    same = metadata(attention__head_count_kv=(2, 2), feed_forward_length=(128, 128))
    assert not faults(same, NAMES)
    config = config_of(same, NAMES, "float16")
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (2, 128)


def test_scalings_and_windows_come_back() -> None:
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__attn_factor": 2.0}
    found = config_of(metadata(**yarn), NAMES, "float16")["rope_scaling"]
    assert (found["rope_type"], found["factor"], found["original_max_position_embeddings"]) == ("yarn", 4.0, 64)
    assert found["attention_factor"] == pytest.approx(2 * 1.1386294)
    # llama.cpp's default is linear, and an older key has its factor
    assert config_of(metadata(rope__scale_linear=8.0), NAMES, "float16")["rope_scaling"]["rope_type"] == "linear"
    mistral = config_of(metadata(attention__sliding_window=32), NAMES, "float16")
    assert (mistral["model_type"], mistral["sliding_window"]) == ("mistral", 32)
    layers = {"attention__sliding_window": 32, "attention__sliding_window_pattern": (False, True)}
    qwen = config_of(metadata("qwen2", **layers), NAMES, "float16")
    assert qwen["layer_types"] == ["full_attention", "sliding_attention"]
    assert qwen["use_sliding_window"] is True


def test_biases_are_told_to_transformers() -> None:
    config = config_of(metadata(), [*NAMES, "blk.0.attn_q.bias", "blk.0.ffn_up.bias"], "float16")
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)


@pytest.mark.parametrize(("more", "names", "message"), [
    ({"attention__head_count_kv": (2, 4)}, [], "llama.attention.head_count_kv differs from layer to layer"),
    ({"rope__dimension_count": 8}, [], "llama.rope.dimension_count is 8, not attention.key_length, 16"),
    ({"rope__scaling__type": "longrope"}, [], "rope.scaling.type 'longrope'"),
    ({"rope__scaling__type": "yarn"}, [], "rope.scaling.factor None"),
    ({"rope__scaling__factor": 2.0}, ["rope_freqs.weight"], "rope_freqs.weight and a rope scaling (linear) at once"),
    ({"rope__scaling__attn_factor": 2.0}, [], "rope.scaling.attn_factor 2.0 without yarn"),
    ({"attention__sliding_window": 9}, ["blk.0.attn_q.bias"], "biases (attn_q.bias), which mistral does not have"),
])  # fmt: skip
def test_what_transformers_could_not_compute_is_said(more: dict[str, Any], names: list[str], message: str) -> None:
    assert faults(metadata(**more), [*NAMES, *names]) == [message]


def test_keys_without_a_place_are_named() -> None:
    assert left_out(metadata(attention__scale=0.5)) == ["llama.attention.scale = 0.5"]
