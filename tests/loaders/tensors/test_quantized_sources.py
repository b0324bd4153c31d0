"""Sources that are already quantized: decoded on the way in, or copied as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.checkpoints.derived_config import read_config
from tests.making import read_safetensors, values_of, weights
from tests.reading import files_of
from tests.reference import decode_bnb4


@pytest.fixture
def quantized(source: Path, tmp_path: Path, weightmill: Any) -> Path:
    assert weightmill("run", f"model.path={source}", f"output.path={tmp_path / 'nf4'}").status == 0
    return tmp_path / "nf4"


def test_a_cast_gives_the_plain_checkpoint_back(quantized: Path, source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill(
        "run", f"model.path={quantized}", f"output.path={tmp_path / 'out'}", "quant=none", "quant.dtype=float32"
    )
    assert ran.status == 0, ran.err
    plain = open_checkpoint(tmp_path / "out")
    assert {spec.name for spec in plain.weights} == {spec.name for spec in open_checkpoint(source).weights}
    assert "quantization_config" not in read_config(files_of(tmp_path / "out"))
    found, stored = read_safetensors(tmp_path / "out"), read_safetensors(quantized)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        decoded = values_of(weights(decode_bnb4(stored, name), "BF16"))  # as the engine decodes: to the model's dtype
        assert np.array_equal(values_of(found[name]), decoded.reshape(found[name].data.shape))
    assert weightmill("verify", f"output.path={tmp_path / 'out'}").status == 0


@pytest.mark.quick
def test_nf4_of_decoded_nf4_is_the_same(quantized: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={quantized}", f"output.path={tmp_path / 'out'}", "quant=nf4")
    assert ran.status == 0, ran.err
    assert weightmill("diff", quantized, tmp_path / "out", "format=json").document["different"] == 0


def test_a_copy_keeps_the_quantization(quantized: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={quantized}", f"output.path={tmp_path / 'out'}", "quant=none")
    assert ran.status == 0, ran.err
    assert read_config(files_of(tmp_path / "out")) == read_config(files_of(quantized))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "why"), [("magic", ";"), ("exl3", " (its codes are walks through a trellis")])
def test_an_unknown_quantization_is_refused(name: str, why: str, source: Path, weightmill: Any) -> None:
    config = source / "config.json"
    config.write_text(config.read_text().replace("{", f'{{"quantization_config": {{"quant_method": "{name}"}},', 1))
    ran = weightmill("plan", f"model.path={source}")
    assert ran.status == 2
    assert f"already quantized ({name}), which is not decoded here{why}" in ran.err
    assert "take the model as its makers published it" in ran.err
    assert weightmill("plan", f"model.path={source}", "quant=none").status == 0
