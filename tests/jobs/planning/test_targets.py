"""A request's target: settings of the quant that rules change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint


def test_a_rule_may_change_settings_of_the_quant(source: Path, tmp_path: Path, weightmill: Any) -> None:
    rules = "rules=[{action: quantize, name: mlp.down_proj, quant: {group_size: 128}}]"
    ran = weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", rules)
    assert ran.status == 0, ran.err
    weights = {spec.name: spec for spec in open_checkpoint(tmp_path / "out").weights}
    for name, group in (("mlp.down_proj", 128), ("mlp.up_proj", 64)):
        weight = f"model.layers.0.{name}.weight"
        assert weights[f"{weight}.absmax"].numel() == -(-2 * weights[weight].numel() // group)
    assert weightmill("verify", f"output.path={tmp_path / 'out'}").status == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{blocksize: 128}", "blocksize: no such setting; did you mean 'group_size'"),
        ("{group_size: 100}", "expected one of 32"),
        ("{double_quant: true}", "differ in bnb_4bit_use_double_quant"),
    ],
)
def test_settings_of_a_rule_are_checked(settings: str, said: str, source: Path, weightmill: Any) -> None:
    rules = f"rules=[{{action: quantize, name: mlp.down_proj, quant: {settings}}}]"
    ran = weightmill("plan", f"model.path={source}", rules)
    assert ran.status == 2
    assert said in ran.err
