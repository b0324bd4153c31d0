"""Mixes within a budget, in the engines that are to load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.making import read_safetensors
from tests.parity.test_mlx import logits, mlx_utils, mx, write_model

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def _on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_mlx_lm_makes_the_same_of_the_same_mix(kind: str, tmp_path: Path, weightmill: Any) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    config = write_model(source, kind)
    ran = weightmill(
        "run", "quant=auto", "quant.among=[mlx_int3,mlx_int4_g32,mlx_mxfp8]", "quant.target_bits=6.5",
        f"model.path={source}", f"output.path={out}", f"output.root={tmp_path / 'root'}",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    block = json.loads((out / "config.json").read_text())["quantization"]
    base = {key: value for key, value in block.items() if not isinstance(value, dict)}
    loaded, _ = mlx_utils.load_model(out)
    assert len({str(block.get(path, base)) for path, module in loaded.named_modules() if hasattr(module, "scales")}) > 1
    model, config = mlx_utils.load_model(source, model_config=config)

    def settings(path: str, module: Any) -> Any:
        if f"{path}.scales" not in stored:
            return False
        return {"mode": "affine", **block[path]} if path in block else base

    stored = read_safetensors(out)
    model, config = mlx_utils.quantize_model(model, config, 64, 4, quant_predicate=settings)
    mlx_utils.save_model(tmp_path / "peer", model)
    peer = read_safetensors(tmp_path / "peer")
    assert set(peer) == set(stored)
    for name, raw in peer.items():
        assert stored[name].data.tobytes() == raw.data.tobytes(), name
    assert np.array_equal(logits(loaded), logits(model))
