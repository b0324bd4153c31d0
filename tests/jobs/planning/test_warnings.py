"""What a plan says aloud before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.planning.build import make_plan
from jobs.planning.targets import Target
from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.rules.rule import Rule
from tests.making import LLAMA, write_checkpoint, write_moe


@pytest.mark.quick
def test_experts_stay_and_it_is_said_aloud(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_moe(tmp_path / "m"))
    target = make_plan(checkpoint, [Target(id="x", scheme=Bnb4("nf4"))], 100).targets["x"]
    assert "6 expert matrices" in target.warnings[0]
    assert "transformers 5" in target.warnings[0]
    rule = Rule(action="quantize", why="test", role=("expert",), label="rules[0]")
    target = make_plan(checkpoint, [Target(id="x", scheme=Bnb4("nf4"), rules=(rule,))], 100).targets["x"]
    assert "transformers 4" in target.warnings[0]


def test_an_unknown_model_type_is_said_aloud(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "llama99", "dtype": "bfloat16"}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", config=config))
    target = make_plan(checkpoint, [Target(id="x", scheme=Bnb4("nf4"))], 100).targets["x"]
    assert "'llama99' is not known" in target.warnings[0]


@pytest.mark.parametrize("has", [False, True])
def test_what_stops_bitsandbytes_on_some_cpus_is_said_aloud(
    has: bool, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.planning.warnings.has_avx512_bf16", lambda: has)
    target = make_plan(open_checkpoint(source), [Target(id="x", scheme=Bnb4("nf4", 128))], 100).targets["x"]
    [said] = target.warnings
    assert said.startswith(
        "12 matrices (model.layers.0.mlp.gate_proj.weight [128, 64] first: its 64 columns are no multiple of its group"
        " size, 128) stop bitsandbytes on a CPU"
    )
    assert ("such as this machine's" in said) == has
    assert make_plan(open_checkpoint(source), [Target(id="x", scheme=Bnb4("nf4"))], 100).targets["x"].warnings == ()
