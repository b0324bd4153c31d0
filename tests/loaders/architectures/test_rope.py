"""Rope scalings as factors of the frequencies and back, and as mlx-lm's settings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from loaders.architectures.mlx import MlxModel, model_of
from loaders.architectures.mlx_rope import rope_fault, scaling_for_mlx
from loaders.architectures.rope import attention_factor, frequency_factors, rope_of, scaling_of
from loaders.architectures.windows import Window, window_of
from loaders.errors import BadSpec

BASE, CONTEXT = 500000.0, 256


def llama3(factor: float, low: float, high: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original, "rope_theta": BASE,
    }  # fmt: skip


@pytest.mark.parametrize("length", [16, 64, 128])
@pytest.mark.parametrize(
    "settings", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (40.0, 0.5, 2.0, 48), (5.5, 1.3, 3.7, 100)]
)
def test_factors_become_a_scaling_that_gives_them_again(settings: tuple[Any, ...], length: int) -> None:
    factors = frequency_factors(llama3(*settings), length)
    assert factors is not None
    found = scaling_of(factors, BASE, CONTEXT)
    again = frequency_factors({"rope_theta": BASE, **found}, length)
    assert again is not None
    assert np.array_equal(again, factors)
    if settings[-1] == 8192 and length == 128:
        assert found == {key: value for key, value in llama3(*settings).items() if key != "rope_theta"}


def test_factors_of_another_kind_are_a_longrope_for_texts_of_any_length() -> None:
    factors = np.array([1, 1.5, 1.25, 7, 3, 2, 9, 4], np.float32)
    found = scaling_of(factors, BASE, CONTEXT)
    assert found["rope_type"] == "longrope"
    assert found["short_factor"] == found["long_factor"] == factors.tolist()
    again = frequency_factors(found, 16)
    assert again is not None
    assert np.array_equal(again, factors)
    assert scaling_of(np.ones(8, np.float32), BASE, CONTEXT) == {}
    assert frequency_factors({**found, "short_factor": [1.0] * 8}, 16) is None


def test_both_styles_of_config_say_the_same() -> None:
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64}
    new = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}, "max_position_embeddings": 64}
    for config in (old, new):
        found = rope_of(config)
        assert (found["rope_type"], found["factor"], found["rope_theta"]) == ("yarn", 4.0, 1e6)
        assert found["original_max_position_embeddings"] == 64
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e6}}
    assert rope_of({"rope_parameters": nested}) == {"rope_theta": 1e6}
    nested["sliding_attention"]["rope_theta"] = 1e4
    with pytest.raises(BadSpec, match="full_attention, sliding_attention have different rotary embeddings"):
        rope_of({"rope_parameters": nested})


def test_a_setting_that_is_no_number_is_refused() -> None:
    with pytest.raises(BadSpec, match=r"\(llama3\) need a number above 0 as factor, found 'eight'"):
        frequency_factors({**llama3(8, 1, 4, 64), "factor": "eight"}, 16)


def mlx(model_type: str) -> MlxModel:
    found = model_of({"model_type": model_type})
    assert found is not None
    return found


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "more", [{}, {"attention_factor": 1.3}, {"mscale": 0.5}, {"mscale": 0.7, "mscale_all_dim": 1.0}]
)
def test_mlx_scales_yarn_as_transformers_does(more: dict[str, float]) -> None:
    scaling = YARN | more
    made = scaling_for_mlx(mlx("llama"), scaling, {"max_position_embeddings": 128})
    assert scaling.items() <= {**made, **more}.items()
    assert attention_factor(made) == attention_factor(scaling)  # transformers still reads the same
    said = attention_factor(scaling)
    one, other = (0.1 * made.get(key, usual) * math.log(4) + 1 for key, usual in (("mscale", 1), ("mscale_all_dim", 0)))
    assert math.isclose(one / other, 0.1 * math.log(4) + 1 if said is None else said)
    assert ("mscale" in made) == bool(more)


@pytest.mark.parametrize(("model_type", "scaling", "message"), [
    ("qwen3_moe", YARN, "knows no rope scaling, and config.json has yarn"),
    ("phi3", YARN, "knows only linear, longrope, and config.json has yarn"),
    ("llama", {"rope_type": "spiral", "factor": 2.0}, "knows only linear, dynamic"),
    ("llama", {**YARN, "truncate": False}, "rounds the range"),
    ("llama", {"rope_type": "longrope", "attention_factor": 1.5, "original_max_position_embeddings": 64}, "longrope's"),
    ("llama", YARN, None),
    ("qwen3_moe", {}, None),
])  # fmt: skip
def test_what_mlx_does_not_compute_is_said(model_type: str, scaling: dict[str, Any], message: str | None) -> None:
    found = rope_fault(mlx(model_type), {"rope_scaling": scaling, "max_position_embeddings": 128})
    assert found is None if message is None else message in str(found)


def test_windows_are_those_of_transformers() -> None:
    assert window_of({"model_type": "mistral"}) == Window(4096)
    assert window_of({"model_type": "mistral", "sliding_window": None}) is None
    assert window_of({"model_type": "llama", "sliding_window": 8}) is None
    qwen = {"model_type": "qwen2", "sliding_window": 8, "num_hidden_layers": 3, "max_window_layers": 2}
    assert window_of(qwen) is None
    assert window_of({**qwen, "use_sliding_window": True}) == Window(8, (False, False, True))
    assert window_of({**qwen, "use_sliding_window": True, "max_window_layers": 3}) is None
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert window_of({**qwen, "use_sliding_window": True, "layer_types": kinds}) == Window(8, (True, False, False))


def test_a_scaling_with_nothing_between_its_two_lengths_divides_all_long_waves_by_the_factor() -> None:
    found = frequency_factors(llama3(16.0, 1.0, 1.0, 8192), 128)  # Llama 4 Scout's
    assert found is not None
    assert {*found.tolist()} == {1.0, 16.0}
    assert found.tolist() == sorted(found.tolist())
