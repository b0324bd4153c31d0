"""Pipelines of diffusers: every component is read, and one that is missing, odd or hostile is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec
from loaders.strategies import loader
from loaders.tensors.sources import tensors_of
from tests import passes
from tests.making import tokenizer, write_checkpoint, write_safetensors
from tests.pipelines import STEM, transformer_tensors, write_component, write_pipeline

pytestmark = pytest.mark.quick


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "pipeline")


def test_a_pipeline_is_the_union_of_its_components(pipeline: Path) -> None:
    checkpoint = open_checkpoint(pipeline)
    assert list(checkpoint.components) == ["text_encoder", "transformer", "vae"]
    alone = {part: open_checkpoint(pipeline / part).weights for part in checkpoint.components}
    assert [w.name for w in checkpoint.weights] == [f"{part}/{w.name}" for part, found in alone.items() for w in found]
    assert {w.file for w in checkpoint.weights} == {
        "text_encoder/model.safetensors", f"transformer/{STEM}.safetensors", f"vae/{STEM}.safetensors",
    }  # fmt: skip
    assert {"model_index.json", "vae/config.json", "scheduler/scheduler_config.json"} <= set(checkpoint.aux)
    read = loader("read").load_weights(checkpoint, names=["transformer/x_embedder.weight"])
    found = np.asarray(read["transformer/x_embedder.weight"].view(np.uint16))
    assert np.array_equal(found, transformer_tensors()["x_embedder.weight"].data)


def test_roles_are_those_of_each_component(pipeline: Path) -> None:
    roles = {t.name: t.role for t in tensors_of(open_checkpoint(pipeline), decode=True).tensors}
    assert roles["transformer/proj_out.weight"] == roles["transformer/x_embedder.weight"] == "linear"
    assert roles["transformer/single_transformer_blocks.1.proj_out.weight"] == "linear"
    assert roles["vae/decoder.conv_in.weight"] == "conv"
    assert roles["text_encoder/embed_tokens.weight"] == "embedding"
    blocks = {t.block for t in tensors_of(open_checkpoint(pipeline), decode=True).tensors}
    assert all(block.partition("/")[0] in ("transformer", "vae", "text_encoder") for block in blocks)


@pytest.mark.parametrize("what", ["weights", "folder"])
def test_a_component_without_weights_is_refused(pipeline: Path, what: str) -> None:
    if what == "weights":
        (pipeline / "transformer" / f"{STEM}.safetensors").unlink()
    else:
        shutil.rmtree(pipeline / "transformer")
    with pytest.raises(BadCheckpoint, match=r"names transformer \(FluxTransformer2DModel\), and the folder"):
        open_checkpoint(pipeline)


@pytest.mark.parametrize("name", ["../vae", "a/b", "..", "/etc", "a\\b", "x\n"])
def test_a_component_is_a_folder_inside(tmp_path: Path, name: str) -> None:
    folder = write_pipeline(tmp_path / "pipeline", **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(BadCheckpoint, match="is no name of a folder; do not trust this file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("entry", [None, 5, [], ["diffusers"], [1, 2], {"a": 1}, True, "vae"])
def test_what_is_no_component_is_let_be(tmp_path: Path, entry: Any) -> None:
    folder = write_pipeline(tmp_path / "pipeline", requires_safety_checker=entry)
    assert list(open_checkpoint(folder).components) == ["text_encoder", "transformer", "vae"]


def test_weights_of_no_component_are_passed_over_aloud(pipeline: Path) -> None:
    write_safetensors(pipeline / "flux1-dev.safetensors", transformer_tensors())
    write_component(pipeline / "controlnet", transformer_tensors(), "FluxControlNetModel")
    checkpoint = open_checkpoint(pipeline)
    assert "controlnet" not in checkpoint.components
    [note] = checkpoint.notes
    assert note.startswith(f"controlnet/{STEM}.safetensors, flux1-dev.safetensors: weights of no component")
    assert "flux1-dev.safetensors" not in checkpoint.aux


def test_a_damaged_component_is_named(pipeline: Path) -> None:
    (pipeline / "vae" / f"{STEM}.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(BadCheckpoint, match="safetensors"):
        open_checkpoint(pipeline)


# --- variants


@pytest.mark.parametrize("file", [f"{STEM}.fp16.safetensors", f"{STEM}.non_ema.safetensors"])
def test_a_variant_beside_the_usual_files_is_passed_over_aloud(pipeline: Path, file: str) -> None:
    write_safetensors(pipeline / "transformer" / file, transformer_tensors())
    checkpoint = open_checkpoint(pipeline)
    assert checkpoint.fingerprint == open_checkpoint(pipeline).fingerprint
    assert {w.file for w in checkpoint.components["transformer"].weights} == {f"{STEM}.safetensors"}
    [note] = checkpoint.notes
    variant = file.split(".")[1]
    assert note.startswith("transformer: weights are read from")
    assert f"the variant {variant} of the model" in note


@pytest.mark.parametrize("stem", [f"{STEM}.fp16-{{}}", f"{STEM}-{{}}.fp16"])
def test_shards_of_a_variant_too(pipeline: Path, stem: str) -> None:
    tensors = list(transformer_tensors().items())
    for number in (1, 2):
        name = stem.format(f"{number:05d}-of-00002")
        write_safetensors(pipeline / "transformer" / f"{name}.safetensors", dict(tensors[number - 1 :: 2]))
    (pipeline / "transformer" / f"{STEM}.safetensors.index.fp16.json").write_text("{}")
    checkpoint = open_checkpoint(pipeline)
    assert len(checkpoint.components["transformer"].files) == 1
    assert not [name for name in checkpoint.aux if "safetensors.index" in name]
    (pipeline / "transformer" / f"{STEM}.safetensors").unlink()
    alone = open_checkpoint(pipeline / "transformer")
    assert len(alone.files) == 2
    assert len(alone.weights) == len(tensors)


def test_of_several_variants_alone_none_is_chosen(pipeline: Path) -> None:
    usual = pipeline / "transformer" / f"{STEM}.safetensors"
    shutil.copy(usual, usual.with_name(f"{STEM}.fp16.safetensors"))
    usual.rename(usual.with_name(f"{STEM}.bf16.safetensors"))
    with pytest.raises(BadSpec, match="component transformer: .* holds the variants bf16, fp16 and not"):
        open_checkpoint(pipeline)


@pytest.mark.parametrize("vae", [[None, None], ["diffusers", "AutoencoderKL"]])
def test_a_folder_without_components_is_an_ordinary_one(tmp_path: Path, vae: list[Any]) -> None:
    folder = write_component(tmp_path / "a", transformer_tensors(), "FluxTransformer2DModel")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": vae}))
    assert not open_checkpoint(folder).components


def test_a_component_in_another_container_is_refused(pipeline: Path, tmp_path: Path) -> None:
    usual = pipeline / "transformer" / f"{STEM}.safetensors"
    source = write_checkpoint(tmp_path / "llama")
    (source / "tokenizer.json").write_text(json.dumps(tokenizer(96)))
    made = passes.run(source, tmp_path / "made", "gguf_q8_0")["gguf_q8_0"].folder
    shutil.copy(next(made.glob("*.gguf")), usual.with_name("flux-Q8_0.gguf"))
    assert open_checkpoint(pipeline).components["transformer"].container == "safetensors"
    usual.unlink()
    with pytest.raises(BadSpec, match="component transformer of .* is gguf, which is not read in a pipeline"):
        open_checkpoint(pipeline)
