"""llama.cpp's names of transformers' tensors, in both directions."""

from __future__ import annotations

import pytest

from loaders.architectures.gguf import ARCHITECTURES, LAYER_NAMES, TOP_NAMES, Architecture

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_no_two_tensors_get_one_name(architecture: Architecture) -> None:
    further = architecture.further_names
    assert not {*further} & {*LAYER_NAMES}
    for names in (TOP_NAMES, {**LAYER_NAMES, **further}):
        assert len(set(names.values())) == len(names), "two modules of transformers have one name in a GGUF"
    for module in (*LAYER_NAMES, *further):
        name = f"model.layers.3.{module}.weight"
        found = architecture.gguf_name(name.replace("{}", "5"))
        assert found is not None
        assert found.expert == (5 if "{}" in module else None)
        assert architecture.hf_name(found.name) == name


def test_a_model_type_is_of_one_architecture() -> None:
    types = [each for architecture in ARCHITECTURES for each in architecture.model_types]
    assert len(set(types)) == len(types)
