"""llama.cpp's names of transformers' tensors, in both directions."""

from __future__ import annotations

import pytest

from loaders.architectures.gguf import MODULES, TOP_NAMES, architecture_of, read_types

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("model_type", [each for types in read_types().values() for each in types])
def test_what_is_read_has_the_name_that_is_written(model_type: str) -> None:
    architecture = architecture_of({"model_type": model_type})
    assert not {*architecture.modules} & {*MODULES}
    names = [f"model.layers.3.{module}.weight" for module in (*MODULES, *architecture.modules)]
    found = {}
    for name in (*names, *(f"{top}.weight" for top in TOP_NAMES)):
        place = architecture.gguf_name(name.replace("{}", "5"))
        if place is None:
            continue  # not every architecture has every module
        assert place.expert == (5 if "{}" in name else None)
        assert architecture.hf_name(place.name) == name
        assert found.setdefault(place.name, name) == name, "two modules of transformers have one name in a GGUF"
    assert len(found) > 10
