"""Layers that tensors have and config.json does not, and the other way round."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.architectures.layers import layers_of

pytestmark = pytest.mark.quick


def names(count: int, prefix: str = "model.") -> list[str]:
    return [f"{prefix}layers.{layer}.mlp.up_proj.weight" for layer in range(count)] + ["lm_head.weight"]


@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model.", "model.language_model.", "backbone."])
def test_a_layer_beyond_the_count_is_found(prefix: str) -> None:
    found = layers_of({"num_hidden_layers": 2}, names(3, prefix))
    assert found.beyond == (f"{prefix}layers.2.mlp.up_proj.weight",)
    assert "config.json has 2 layers, and 1 tensor is of layers beyond (2)" in found.notes[0]


def test_layers_without_tensors_are_found() -> None:
    found = layers_of({"text_config": {"num_hidden_layers": 4}}, names(2))
    assert (found.beyond, found.missing) == ((), (2, 3))


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers"])
def test_layers_for_multi_token_prediction_are_none_beyond(key: str) -> None:
    assert layers_of({"num_hidden_layers": 2, key: 1}, names(3)).beyond == ()
    assert len(layers_of({"num_hidden_layers": 2, key: 1}, names(4)).beyond) == 1
    unclaimed = [*names(3), "model.layers.2.eh_proj.weight"]
    assert layers_of({"num_hidden_layers": 2}, unclaimed).beyond == ()


@pytest.mark.parametrize("count", ["2", -1, 10**30, [2], True, None, 2.0])
def test_a_count_that_is_none_says_nothing(count: Any) -> None:
    assert layers_of({"num_hidden_layers": count, "text_config": [1]}, names(3)).notes == ()


def test_towers_and_decoders_have_counts_of_their_own() -> None:
    others = ["vision_tower.layers.9.w", "model.visual.blocks.9.w", "model.decoder.layers.9.w", "mtp.layers.9.w"]
    assert layers_of({"num_hidden_layers": 2}, [*names(2), *others]).notes == ()
