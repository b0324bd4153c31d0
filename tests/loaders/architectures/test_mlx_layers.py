"""Layers whose kind mlx-lm works out: the setting that a list fits, or a refusal."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.architectures.mlx_config import fault, translate_config
from loaders.architectures.mlx_layers import Place, places_of

F, S = "full_attention", "sliding_attention"


def text(**config: Any) -> dict[str, Any]:
    return {"num_hidden_layers": 4, **config}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("layers", "number"), [([S, F, S, F], 2), ([F] * 4, 1), ([S] * 4, 5), ([S, S, S, F], 4), ([F, S, F, S], None)]
)
def test_every_nth_layer(layers: list[str], number: int | None) -> None:
    place = Place(key="layer_types", value=F, every="pattern", says="attends fully by pattern")
    assert place.setting(text(layer_types=layers)) == ({} if number is None else {"pattern": number})
    said = place.fault(text(layer_types=layers))
    assert said == (None if number else "attends fully by pattern, not as layer_types says")


@pytest.mark.quick
def test_the_first_layers_and_a_fixed_number() -> None:
    first, fixed = places_of(
        [
            {"key": "mlp", "value": "dense", "first": "dense_layers", "says": "x"},
            {"key": "ropes", "value": 0, "every": 4, "says": "leaves out rope in every fourth layer"},
        ]
    )
    assert first.setting(text(mlp=["dense", "sparse", "sparse", "sparse"])) == {"dense_layers": 1}
    assert first.setting(text(mlp=["sparse"] * 4)) == {"dense_layers": 0}
    assert first.fault(text(mlp=["sparse", "dense", "sparse", "sparse"])) is not None
    assert fixed.fault(text(ropes=[1, 1, 1, 0])) is None
    assert fixed.setting(text(ropes=[1, 1, 1, 0])) == {}
    assert fixed.fault(text(ropes=[1, 0, 1, 0])) is not None


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"layer_types": "sliding"},
        {"layer_types": [1], "num_hidden_layers": "4"},
        {"layer_types": [1], "num_hidden_layers": 10**15},
    ],
)
def test_without_a_list_nothing_is_said(wrong: dict[str, Any]) -> None:
    place = Place(key="layer_types", value=F, every="pattern", says="attends fully by pattern")
    assert place.setting(wrong) == {}
    assert place.fault(wrong) is None


@pytest.mark.quick
def test_layers_as_letters() -> None:
    place = Place(key="layer_types", value=S, spelled="pattern", letters="LG", says="slides by pattern")
    assert place.setting(text(layer_types=[S, F, S, F], pattern="LG")) == {}
    assert place.setting(text(layer_types=[S, S, S, F])) == {"pattern": "LLLG"}
    assert place.setting(text(layer_types=[F] * 4, pattern="LG")) == {"pattern": None}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "knows hidden_act 'silu' or 'swish', and config.json has 'gelu'"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared"]}, "has an indexer in every layer, not as indexer_types"),
        ("ernie4_5", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "knows no rope scaling"),
    ],
)
def test_what_mlx_lm_does_not_read_is_refused(model_type: str, changes: dict[str, Any], said: str) -> None:
    from loaders.architectures.mlx import model_of

    config = {"model_type": model_type, "num_hidden_layers": 2, "rope_theta": 10000.0, **changes}
    model = model_of(config)
    assert model is not None
    assert said in (fault(model, config) or "")


@pytest.mark.quick
def test_config_json_gets_what_mlx_lm_reads() -> None:
    from loaders.architectures.mlx import model_of

    config = {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", F], "num_hidden_layers": 2}
    model = model_of(config)
    assert model is not None
    assert translate_config(model, config, is_tied=True)["layer_types"] == ["mamba", "attention"]
