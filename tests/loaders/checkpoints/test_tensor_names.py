"""Tensors that several files hold, that the index does not name, and whose names training changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint
from loaders.strategies import loader
from tests.making import Raw, llama_tensors, write_checkpoint, write_index, write_safetensors

pytestmark = pytest.mark.quick


def number(value: float) -> Raw:
    return Raw("F32", np.full(3, value, np.float32))


def two_files(folder: Path, one: float, other: float, wanted: str | None = None) -> Path:
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"w": number(one), "y": number(0)})
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"w": number(other), "x": number(0)})
    if wanted is not None:
        write_index(
            folder, {"w": wanted, "x": "model-00002-of-00002.safetensors", "y": "model-00001-of-00002.safetensors"}
        )
    return folder


def value_of(folder: Path) -> float:
    return float(loader("eager").load_weights(folder)["w"][0])


def test_copies_with_the_same_bytes_are_read_once(tmp_path: Path) -> None:
    root = two_files(tmp_path, 1, 1)
    assert [spec.name for spec in open_checkpoint(root).weights] == ["w", "y", "x"]
    assert "1 tensor is in several files with the same bytes, 'w'" in open_checkpoint(root).notes[0]


def test_copies_that_differ_are_refused_where_nothing_decides(tmp_path: Path) -> None:
    with pytest.raises(
        BadCheckpoint, match="'w' is in model-00001.* and in model-00002.*with other bytes; one of them"
    ):
        open_checkpoint(two_files(tmp_path, 1, 2))


def test_an_index_decides_for_the_copy_that_engines_read_last(tmp_path: Path) -> None:
    root = two_files(tmp_path, 1, 2, "model-00002-of-00002.safetensors")
    assert value_of(root) == 2
    assert "read from model-00002-of-00002.safetensors, as the index says" in open_checkpoint(root).notes[0]


def test_an_index_that_engines_would_not_follow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="the index says model-00001.*, while engines would read model-00002"):
        open_checkpoint(two_files(tmp_path, 1, 2, "model-00001-of-00002.safetensors"))


def test_tensors_that_the_index_does_not_name_are_read_and_said(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", shards=2)
    index = json.loads((root / "model.safetensors.index.json").read_text())["weight_map"]
    del index["lm_head.weight"]
    write_index(root, index)
    found = open_checkpoint(root)
    assert {spec.name for spec in found.weights} == set(llama_tensors())
    assert "1 tensor is in the files but not in the index, 'lm_head.weight'" in found.notes[0]


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"\ud800": number(1)})
    with pytest.raises(BadCheckpoint, match=r"model.safetensors: the name '\\ud800' is no text"):
        open_checkpoint(tmp_path)


# --- what training puts into names


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_what_training_put_into_names_goes_and_is_said(tmp_path: Path, wrap: Callable[[str], str], shards: int) -> None:
    tensors = llama_tensors()
    root = write_checkpoint(tmp_path / "m", {wrap(name): raw for name, raw in tensors.items()}, shards=shards)
    found = open_checkpoint(root)
    assert {spec.name for spec in found.weights} == set(tensors)
    assert f"of {len(tensors)} tensors" in found.notes[0]
    loaded = loader("lazy").load_weights(root)
    assert all(np.asarray(loaded[n]).tobytes() == raw.data.tobytes() for n, raw in tensors.items())


@pytest.mark.engine
def test_a_library_that_looks_tensors_up_by_name_is_given_those_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("fastsafetensors")
    write_safetensors(tmp_path / "model.safetensors", {"module.w": number(4)})
    assert float(loader("fastsafetensors").load_weights(tmp_path)["w"][0]) == 4


def test_names_that_would_be_the_same_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"_orig_mod.w": number(1), "w": number(2)})
    with pytest.raises(BadCheckpoint, match="'_orig_mod.w' and 'w' would both be 'w'"):
        open_checkpoint(tmp_path)


def test_module_before_some_names_only_is_left_and_said(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"module.w": number(1), "x": number(2)})
    found = open_checkpoint(tmp_path)
    assert [spec.name for spec in found.weights] == ["module.w", "x"]
    assert "1 of 2 names begin with module." in found.notes[0]


def test_a_flat_parameter_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"_fsdp_wrapped_module._flat_param": number(1)})
    with pytest.raises(BadCheckpoint, match="a flat parameter of FSDP"):
        open_checkpoint(tmp_path)
