"""LLaMA Pro's block expansion as a job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.checkpoints.checkpoint import open_checkpoint
from loaders.errors import BadSpec
from loaders.places import DEMO
from loaders.tensors.block_expansion import Expansion, expansion_of
from tests.conftest import Ran
from tests.failing import fail_at
from tests.making import LLAMA, llama_tensors, read_safetensors, snapshot, write_checkpoint, write_moe

EXPAND = ("transform=block_expansion", "cluster=local")


def tiny(folder: Path, layers: int = 4, **config: Any) -> Path:
    made = {**LLAMA, "num_hidden_layers": layers, "dtype": "bfloat16", **config}
    return write_checkpoint(folder, llama_tensors(layers=layers), config=made, shards=2)


@pytest.mark.quick
def test_a_new_block_stands_behind_every_run_of_old_ones() -> None:
    found = Expansion(6, 3).origins
    assert found == tuple((n, new) for n in range(6) for new in ([False, True] if n % 2 else [False]))


def test_new_blocks_are_copies_with_zero_projections(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    source = tiny(tmp_path / "m", layer_types=["full_attention"] * 4)
    ran = weightmill(
        "run",
        f"model.path={source}",
        *EXPAND,
        "transform.num_blocks=2",
        "quant=none",
        f"output.path={tmp_path / 'out'}",
    )
    assert ran.status == 0, ran.err
    old, new = read_safetensors(source), read_safetensors(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (6, 6)
    assert len(new) == len(old) + 2 * 9
    for number, (origin, is_new) in enumerate(Expansion(4, 2).origins):
        for name in [n for n in old if n.startswith(f"model.layers.{origin}.")]:
            got = new[name.replace(f"layers.{origin}.", f"layers.{number}.")]
            if is_new and ("o_proj" in name or "down_proj" in name):
                assert got.data.shape == old[name].data.shape
                assert not got.data.any()
            else:
                assert np.array_equal(got.data, old[name].data)
    verified = weightmill("verify", f"output.path={tmp_path / 'out'}")
    assert verified.status == 0, verified.err


@pytest.mark.parametrize("quant", ["nf4", "mlx_int4", "gguf_q8_0", "w4a16"])
def test_any_quant_takes_the_new_blocks_and_verifies(
    quant: str, tmp_path: Path, weightmill: Callable[..., Ran]
) -> None:
    output = tmp_path / "out"
    given = ("model=demo", *EXPAND, "transform.num_blocks=3", f"quant={quant}", f"output.path={output}", "format=json")
    planned, ran = weightmill("plan", *given), weightmill("run", *given)
    assert ran.status == 0, ran.err
    files = {file["name"]: file["bytes"] for file in planned.document["output"]["files"]}
    assert files == {name: (output / name).stat().st_size for name in files}
    verified = weightmill("verify", f"output.path={output}")
    assert verified.status == 0, verified.err


def test_verify_finds_a_zero_that_is_none(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    output = tmp_path / "out"
    given = ("model=demo", *EXPAND, "transform.num_blocks=1", "quant=none", f"output.path={output}")
    assert weightmill("run", *given).status == 0
    [spec] = [w for w in open_checkpoint(output).weights if w.name == "model.layers.3.mlp.down_proj.weight"]
    with (output / spec.file).open("r+b") as file:
        file.seek(spec.offset + 1)
        file.write(b"\x3f")
    verified = weightmill("verify", f"output.path={output}")
    assert verified.status != 0
    assert "model.layers.3.mlp.down_proj.weight" in verified.out + verified.err


def test_another_number_of_blocks_is_another_output(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    names = {
        weightmill("plan", "model=demo", *EXPAND, f"transform.num_blocks={n}", "format=json").document["output"]["path"]
        for n in (1, 3)
    }
    assert {Path(name).name for name in names} == {"demo-plus1-nf4", "demo-plus3-nf4"}


@pytest.mark.parametrize(
    ("config", "num_blocks", "said"),
    [
        ({"model_type": "gpt_oss"}, 2, "which tensors of model_type 'gpt_oss' add to its residual stream is not known"),
        ({}, 3, "3 does not divide the model's 4 blocks; choose of 1, 2, 4"),
        ({"model_type": "qwen2", "use_sliding_window": True}, 2, "config.json has no layer_types"),
        ({"layer_types": ["full_attention"] * 3}, 2, "layer_types has 3 entries for 4 blocks"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, 2, "decoder_sparse_step is 2"),
    ],
)
def test_what_cannot_be_expanded_is_refused(tmp_path: Path, config: dict[str, Any], num_blocks: int, said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        expansion_of(open_checkpoint(tiny(tmp_path / "m", **config)), num_blocks)


def test_a_quantized_source_that_is_copied_is_refused(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    assert weightmill("run", "model=demo", "quant=nf4", "cluster=local", f"output.path={tmp_path / 'nf4'}").status == 0
    given = (f"model.path={tmp_path / 'nf4'}", *EXPAND, "transform.num_blocks=3", f"output.path={tmp_path / 'out'}")
    refused = weightmill("run", *given, "quant=none")
    assert refused.status != 0
    assert "a part of a quantized weight that is copied as it is stored" in refused.err
    decoded = weightmill("run", *given, "quant=none", "quant.dtype=bfloat16")
    assert decoded.status == 0, decoded.err


def test_experts_of_new_blocks_are_zero_too(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    source = write_moe(tmp_path / "moe")
    given = (f"model.path={source}", *EXPAND, "transform.num_blocks=2", "quant=none", f"output.path={tmp_path / 'out'}")
    ran = weightmill("run", *given)
    assert ran.status == 0, ran.err
    new = read_safetensors(tmp_path / "out")
    assert not new["model.layers.1.mlp.experts.0.down_proj.weight"].data.any()
    assert new["model.layers.1.mlp.experts.1.up_proj.weight"].data.any()


@pytest.mark.engine
def test_logits_are_unchanged_before_training(tmp_path: Path, weightmill: Callable[..., Ran]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    output = tmp_path / "out"
    ran = weightmill("run", "model=demo", *EXPAND, "transform.num_blocks=3", "quant=none", f"output.path={output}")
    assert ran.status == 0, ran.err
    source = DEMO
    one = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    other = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert len(other.model.layers) == 6
        assert torch.equal(one(ids).logits, other(ids).logits)


def test_an_interrupted_expansion_goes_on_to_the_same_bytes(
    tmp_path: Path, weightmill: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny(tmp_path / "m")
    given = (f"model.path={source}", *EXPAND, "transform.num_blocks=2", "quant=nf4", "unit_mb=0.02")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert weightmill("run", *given, f"output.path={whole}").status == 0

    with monkeypatch.context() as patch:
        fail_at(patch, 4, KeyboardInterrupt())
        assert weightmill("run", *given, f"output.path={out}", "cluster.units_at_once=1").status == 130
    assert not out.exists()
    ran = weightmill("run", *given, f"output.path={out}", "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["run"]["units_resumed"] == 3 < ran.document["run"]["units"]
    report = "weightmill.json"  # which tells how long the run took
    assert snapshot(out, ignore=[report]) == snapshot(whole, ignore=[report])
