"""The layout of diffusers: each component in its sub-folder, as diffusers and transformers would write it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.architectures.diffusers import DiffusersClass
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec
from tests import passes
from tests.making import read_safetensors, weights
from tests.pipelines import STEM, transformer_tensors, vae_tensors, write_component, write_pipeline

pytestmark = pytest.mark.quick


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "pipeline")


def planned(folder: Path, preset: str, *settings: str) -> dict[str, str]:
    """The action on each tensor."""
    target = passes.plan(folder, preset, settings=settings).targets[preset]
    return {decision.tensor.name: decision.action for decision in target.decisions}


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_each_component_goes_to_its_folder(pipeline: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
    out = passes.run(pipeline, tmp_path / "out", "nf4")["nf4"].folder
    for name in ("model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (out / name).read_bytes() == (pipeline / name).read_bytes()
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.safetensors")} == {
        "text_encoder/model.safetensors", f"transformer/{STEM}.safetensors", f"vae/{STEM}.safetensors",
    }  # fmt: skip
    # In the files tensors have the names that the component's class knows.
    found, source = read_safetensors(out / "transformer"), transformer_tensors()
    assert found["proj_out.weight"].dtype == "U8"
    assert np.array_equal(found["proj_out.bias"].data, source["proj_out.bias"].data)
    assert "proj_out.weight.quant_state.bitsandbytes__nf4" in found
    kept = read_safetensors(out / "vae")
    assert all(np.array_equal(kept[name].data, raw.data) for name, raw in vae_tensors().items())
    assert before == {path: path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}


def test_the_config_of_a_component_is_diffusers_own(pipeline: Path, tmp_path: Path) -> None:
    out = passes.run(pipeline, tmp_path / "out", "int8")["int8"].folder
    made = config(out / "transformer")
    # diffusers sorts the keys of its files, and so the block stands among them.
    assert list(made) == sorted(made)
    block = made.pop("quantization_config")
    assert made == config(pipeline / "transformer")
    assert (block["load_in_8bit"], block["_load_in_8bit"], block["llm_int8_skip_modules"]) == (True, True, None)
    assert config(out / "text_encoder")["quantization_config"]["quant_method"] == "bitsandbytes"


def test_a_component_in_several_files_has_an_index_of_its_own(pipeline: Path, tmp_path: Path) -> None:
    source, target = open_checkpoint(pipeline), passes.target("nf4", "quant.double_quant=true")
    plan = passes.make_plan(source, [target], 0.05)
    assert all(len({name.partition("/")[0] for name in (t.name for t in u.tensors)}) == 1 for u in plan.units)
    files = [file.name for file in plan.targets["nf4"].files]
    shards = [name for name in files if name.startswith("transformer/")]
    assert shards == [f"transformer/{STEM}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert f"vae/{STEM}.safetensors" in files


def test_the_head_and_the_layers_called_like_it_are_linear(pipeline: Path) -> None:
    found = planned(pipeline, "nf4")
    assert {action for name, action in found.items() if name.endswith("proj_out.weight")} == {"quantize"}
    assert {action for name, action in found.items() if name.startswith("vae/")} == {"keep"}
    assert found["text_encoder/embed_tokens.weight"] == "keep"


@pytest.mark.parametrize(("chosen", "quantized"), [("vae", {"vae"}), ("transformer,vae", {"transformer", "vae"})])
def test_components_are_chosen(pipeline: Path, chosen: str, quantized: set[str]) -> None:
    found = planned(pipeline, "nf4", f"model.components_to_quantize=[{chosen}]")
    assert {name.partition("/")[0] for name, action in found.items() if action == "quantize"} == quantized


def test_rules_name_components(pipeline: Path, tmp_path: Path) -> None:
    rule = 'rules=[{name: "^transformer/x_embedder", action: keep}]'
    out = passes.run(pipeline, tmp_path / "out", "nf4", settings=[rule])["nf4"].folder
    assert read_safetensors(out / "transformer")["x_embedder.weight"].dtype == "BF16"
    assert config(out / "transformer")["quantization_config"]["llm_int8_skip_modules"] == ["x_embedder"]


def test_what_the_skip_list_cannot_say_is_refused(pipeline: Path) -> None:
    with pytest.raises(BadSpec, match=r"single_transformer_blocks\.0\.proj_out is quantized, but diffusers would skip"):
        planned(pipeline, "nf4", 'rules=[{name: "^transformer/proj_out", action: keep}]')


@pytest.mark.parametrize(
    ("preset", "said"),
    [("gguf_q4_k_m", "a GGUF as a transformer's single file"), ("hqq4", "for hqq"), ("mlx_int4", "for mlx"),
     ("w8a8", "for compressed-tensors"), ("ternary", "for bitnet")],
)  # fmt: skip
@pytest.mark.parametrize("part", ["", "transformer"])
def test_other_schemes_are_refused(pipeline: Path, part: str, preset: str, said: str) -> None:
    with pytest.raises(BadSpec, match=f"^quant: diffusers .*{said}.*bitsandbytes") as error:
        planned(pipeline / part, preset)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["output=gguf"], "written for diffusers"),
        (["transform=block_expansion", "transform.num_blocks=1"], "transform:"),
        (["model.components_to_quantize=[unet]"], "unet is no component with weights; there are text_encoder"),
    ],
)
def test_other_wishes_are_refused(pipeline: Path, settings: list[str], said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        planned(pipeline, "nf4", *settings)


@pytest.mark.parametrize("setting", ["output=diffusers", "model.components_to_quantize=[vae]"])
def test_a_language_model_is_not_written_for_diffusers(source: Path, setting: str) -> None:
    with pytest.raises(BadSpec, match="is no (?:model|pipeline) of diffusers"):
        planned(source, "nf4", setting)


def test_a_component_by_itself(pipeline: Path, tmp_path: Path) -> None:
    whole = passes.run(pipeline, tmp_path / "whole", "nf4")["nf4"].folder
    alone = passes.run(pipeline / "transformer", tmp_path / "alone", "nf4")["nf4"].folder
    for name in (f"{STEM}.safetensors", "config.json"):
        assert (alone / name).read_bytes() == (whole / "transformer" / name).read_bytes()


def test_a_quantized_pipeline_is_decoded_and_copied(pipeline: Path, tmp_path: Path) -> None:
    quantized = passes.run(pipeline, tmp_path / "a", "nf4")["nf4"].folder
    copied = passes.run(quantized, tmp_path / "b", "none")["none"].folder
    for name in (f"transformer/{STEM}.safetensors", "transformer/config.json", "text_encoder/config.json"):
        assert (copied / name).read_bytes() == (quantized / name).read_bytes()
    plain = passes.run(quantized, tmp_path / "c", "none", settings=["quant.dtype=bfloat16"])["none"].folder
    assert "quantization_config" not in config(plain / "transformer")
    again = passes.run(plain, tmp_path / "d", "nf4")["nf4"].folder
    assert np.array_equal(
        read_safetensors(again / "transformer")["proj_out.weight"].data,
        read_safetensors(quantized / "transformer")["proj_out.weight"].data,
    )


def test_modules_that_a_class_keeps_in_float32_are_kept(tmp_path: Path) -> None:
    tensors = transformer_tensors()
    tensors["condition_embedder.time_embedder.linear_1.weight"] = tensors["proj_out.weight"]
    folder = write_component(tmp_path / "wan", tensors, "WanTransformer3DModel")
    found = planned(folder, "nf4")
    assert found["condition_embedder.time_embedder.linear_1.weight"] == "keep"
    out = passes.run(folder, tmp_path / "out", "nf4")["nf4"]
    # diffusers finds these modules by itself.
    assert out.config is not None
    assert out.config["quantization_config"]["llm_int8_skip_modules"] is None


@pytest.mark.parametrize("preset", ["nf4", "int8"])
def test_four_bit_layers_that_would_compute_in_float32_are_said(tmp_path: Path, preset: str) -> None:
    tensors = {"proj_out.weight": weights(np.ones((64, 64), np.float32), "F32")}
    folder = write_component(tmp_path / "wan", tensors, "WanTransformer3DModel")
    warnings = passes.plan(folder, preset).targets[preset].warnings
    assert any("is stored in float32" in each for each in warnings) == (preset == "nf4")


def test_an_unknown_class_is_said_and_its_tables_are_skipped(tmp_path: Path) -> None:
    assert not DiffusersClass("NextYearsTransformer2DModel").is_known
    tensors = {**transformer_tensors(), "embed.weight": transformer_tensors()["proj_out.weight"]}
    folder = write_component(tmp_path / "next", tensors, "NextYearsTransformer2DModel")
    target = passes.plan(folder, "nf4").targets["nf4"]
    assert any("NextYearsTransformer2DModel" in warning for warning in target.warnings)
    assert target.config is not None
    assert target.config["quantization_config"]["llm_int8_skip_modules"] == ["embed"]
