"""The rules of a layout's engine, for jobs and for models that are encoded while they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.layouts.mlx import MlxLayout
from loaders.layouts.rules import layout_rules
from loaders.quantization.schemes.mlx_affine import MlxAffine
from loaders.rules.mlx import MlxRules
from loaders.rules.rule import Rule
from loaders.tensors.sources import tensors_of
from tests.making import LLAMA, Raw, llama_tensors, write_checkpoint

pytestmark = pytest.mark.quick

MORE = {
    "a layer beyond": ("model.layers.2.mlp.up_proj.weight", {}),
    "a layer for multi-token prediction": ("model.layers.2.eh_proj.weight", {"num_nextn_predict_layers": 1}),
}


def rules_of(folder: Path, tensors: dict[str, Raw], **config: int) -> tuple[Rule, ...]:
    checkpoint = open_checkpoint(str(write_checkpoint(folder, tensors, config={**LLAMA, **config})))
    formed = MlxLayout().formed(checkpoint, tensors_of(checkpoint, decode=True, split=True).tensors)
    return layout_rules(MlxLayout(), checkpoint, formed, MlxAffine(4, 64), MlxRules(64))


@pytest.mark.parametrize("kind", MORE)
def test_what_is_left_out_has_no_say_in_a_mix(kind: str, tmp_path: Path) -> None:
    (name, config), tensors = MORE[kind], llama_tensors()
    ragged = Raw("BF16", tensors["model.layers.0.mlp.up_proj.weight"].data[:, :40])
    wanted = rules_of(tmp_path / "without", tensors)
    found = rules_of(tmp_path / "with", {**tensors, name: ragged}, **config)
    [dropped] = [rule for rule in found if rule not in wanted]
    assert (dropped.action, dropped.names) == ("drop", {name})
