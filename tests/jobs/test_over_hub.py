"""Whole jobs from and to the Hub, against the test-suite's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hub.server import Hub
from tests.jobs.test_over_stores import PRESETS, comparable, given
from tests.making import make_source, snapshot

REPO = "org/model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_source(tmp_path / "model")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_source_on_the_hub_is_as_a_folder(
    preset: str, model: Path, tmp_path: Path, hub: Hub, weightmill: Any
) -> None:
    files = snapshot(model)
    commit = hub.put(REPO, files)
    assert weightmill("run", *given(model, tmp_path / "here", preset)).status == 0
    ran = weightmill("run", *given(f"hf://{REPO}", tmp_path / "from", preset))
    assert ran.status == 0, ran.err
    made = snapshot(tmp_path / "from")
    assert comparable(made) == comparable(snapshot(tmp_path / "here"))
    assert json.loads(made["weightmill.json"])["source"]["path"] == f"hf://{REPO}@{commit}"
    assert weightmill("verify", f"output.path={tmp_path / 'from'}").status == 0


def test_a_name_of_the_hub_stands_for_its_address(model: Path, hub: Hub, weightmill: Any) -> None:
    commit = hub.put("Org/Model-1.5", snapshot(model))
    ran = weightmill("inspect", "model.path=Org/Model-1.5", "format=json")
    assert ran.document["path"] == f"hf://Org/Model-1.5@{commit}"
    assert "Org/Model-1.5 is no folder here: it is read from the Hub, as hf://Org/Model-1.5" in ran.err
    Path("Org/Model-1.5").mkdir(parents=True)
    ran = weightmill("inspect", "model.path=Org/Model-1.5")
    assert ran.status == 2
    assert "model.path: expected safetensors" in ran.err


def test_a_slip_of_a_folders_name_is_not_taken_for_the_hubs(hub: Hub, weightmill: Any) -> None:
    Path("models/llama-8b").mkdir(parents=True)
    for given_name in ("models/llama-8", "model/llama-8b"):
        ran = weightmill("inspect", f"model.path={given_name}")
        assert ran.status == 2
        assert f"is it models/llama-8b? the Hub's repository of that name is hf://{given_name}" in ran.err
    ran = weightmill("inspect", "model.path=models/other")
    assert "the Hub's repository of that name is hf://models/other" in ran.err
    assert hub.asked == []


def test_presets_are_read_from_the_hub(model: Path, hub: Hub, weightmill: Any) -> None:
    hub.put("Qwen/Qwen3-8B", snapshot(model))
    ran = weightmill("run", "model=qwen3_8b", "quant=nf4", "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["output"].endswith("/weightmill/qwen3_8b-nf4")
    before = hub.get("Qwen/Qwen3-8B").branches["main"]
    hub.put("Qwen/Qwen3-8B", {"config.json": b"{}"})
    assert weightmill("verify", "output.path=weightmill/qwen3_8b-nf4").status == 0  # of that commit
    ran = weightmill("run", f"model.revision={before}", "model=qwen3_8b", "quant=fp4", "format=json")
    assert ran.document["source"]["path"] == f"hf://Qwen/Qwen3-8B@{before}"


def test_outputs_are_named_by_the_model_not_by_its_commit(model: Path, hub: Hub, weightmill: Any) -> None:
    commit = hub.put(REPO, snapshot(model))
    ran = weightmill("run", f"model.path=hf://{REPO}@{commit}", "quant=nf4", "format=json")
    assert ran.document["output"].endswith("/weightmill/model-nf4")
