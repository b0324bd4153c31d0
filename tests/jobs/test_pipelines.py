"""Jobs over pipelines of diffusers: the same guarantees as for any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.output.card_block import without_blocks
from loaders.storage.address import Address
from tests.failing import fail_at
from tests.making import snapshot
from tests.pipelines import STEM, write_pipeline
from tests.shelf.places import OF_JOBS, Place, contents, fill

pytestmark = pytest.mark.quick

REPORT = "weightmill.json"
PLACES = (REPORT, "report.html")  # which tell where the source was


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "pipeline")


def arguments(source: Address | Path, out: Address | Path) -> list[str]:
    return [f"model.path={source}", f"output.path={out}", "quant=nf4", "quant.double_quant=true", "unit_mb=0.05"]


def test_a_pipeline_is_written_verified_and_linted(pipeline: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    ran = weightmill("run", *arguments(pipeline, out), "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["lint"] == []
    index = json.loads((out / "transformer" / f"{STEM}.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in (out / "transformer").glob("*.safetensors")}
    assert weightmill("verify", f"output.path={out}").status == 0
    assert weightmill("lint", f"output.path={out}").status == 0
    shown = weightmill("inspect", f"model.path={out}", "format=json").document
    assert (shown["class"], shown["quantization"]) == ("FluxPipeline", "bitsandbytes")
    assert {part: each["class"] for part, each in shown["components"].items()} == {
        "text_encoder": "llama", "transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL",
    }  # fmt: skip
    assert "AutoencoderKL" in weightmill("inspect", f"model.path={out}").out


@pytest.mark.parametrize("name", [f"vae/{STEM}.safetensors", "transformer/config.json", "model_index.json"])
def test_a_changed_byte_of_any_component_is_found(pipeline: Path, tmp_path: Path, weightmill: Any, name: str) -> None:
    out = tmp_path / "out"
    assert weightmill("run", *arguments(pipeline, out)).status == 0
    data = (out / name).read_bytes()
    (out / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name.startswith("vae") else data + b" ")
    ran = weightmill("verify", f"output.path={out}", "format=json")
    assert ran.status == 1
    assert any("vae/" in fault or name in fault for fault in ran.document["faults"])


@pytest.mark.parametrize("kind", OF_JOBS[1:])
def test_the_output_is_the_same_in_other_stores(
    pipeline: Path, kind: str, tmp_path: Path, place_of: Callable[[str], Place], weightmill: Any
) -> None:
    assert weightmill("run", *arguments(pipeline, tmp_path / "here")).status == 0
    place = place_of(kind)
    out = place.address / "out"
    ran = weightmill("run", *arguments(fill(place, pipeline, "pipeline"), out))
    assert ran.status == 0, ran.err
    here, there = snapshot(tmp_path / "here"), contents(out)
    one, other = ({n: without_blocks(d) for n, d in files.items() if n not in PLACES} for files in (here, there))
    assert one == other
    assert weightmill("verify", f"output.path={out}").status == 0


def test_an_interrupted_job_goes_on(
    pipeline: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weightmill("run", *arguments(pipeline, tmp_path / "whole")).status == 0
    out = tmp_path / "out"

    ran = fail_at(monkeypatch, 4)
    with pytest.raises(ValueError, match="a bug"):
        weightmill("run", *arguments(pipeline, out), "cluster.units_at_once=1")
    assert not out.exists()
    done = set(ran[:3])
    assert weightmill("run", *arguments(pipeline, out)).status == 0
    assert not done.intersection(ran[4:])
    whole = snapshot(tmp_path / "whole", ignore=[REPORT])
    assert snapshot(out, ignore=[REPORT]) == whole


def test_lint_finds_a_skip_list_that_does_not_fit(pipeline: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    assert weightmill("run", *arguments(pipeline, out)).status == 0
    file = out / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["proj_out"]
    file.write_text(json.dumps(config))
    ran = weightmill("lint", f"output.path={out}", "format=json")
    [found] = ran.document["findings"]
    assert found["what"].startswith("transformer: 3 quantized layers are skipped by llm_int8_skip_modules")
    assert (ran.status, found["engine"], found["level"]) == (1, "diffusers", "fault")


def test_recommending_is_for_language_models(pipeline: Path, weightmill: Any) -> None:
    ran = weightmill("recommend", f"model.path={pipeline}")
    assert ran.status == 2
    assert "is of diffusers" in ran.err
