"""Files that hold weights are known by the suffixes of all containers."""

from __future__ import annotations

import pytest

from loaders.checkpoints.aux_files import aux_notes, find_aux, is_weights
from loaders.containers import CONTAINERS, Container
from loaders.storage.base import Entry

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_what_a_container_writes_is_never_carried_over(container: Container) -> None:
    if container.suffixes:
        assert is_weights(container.file_name(1, 1))
        assert is_weights(container.file_name(2, 3))
    assert container.index is None or is_weights(container.index)


@pytest.mark.parametrize("name", ["model.onnx", "tf_model.h5", "deep/consolidated.pth", "model.bin.index.json"])
def test_weights_of_other_formats_are_weights(name: str) -> None:
    assert is_weights(name)
    assert not is_weights("config.json")


@pytest.mark.parametrize("name", ["adapter_config.json", "lora/adapter_config.json"])
def test_the_config_of_an_adapter_is_not_carried_without_it(name: str) -> None:
    everything = [Entry(each, 1, "1") for each in ("config.json", name, "adapter_model.safetensors")]
    assert find_aux(everything) == ("config.json",)
    assert aux_notes(everything) == [
        f"{name} is not carried over: no adapter's weights are, and nothing could be loaded by it alone"
    ]
