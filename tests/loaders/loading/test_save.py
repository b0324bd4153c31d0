"""save: what quantize made, as the folder that a job writes and the engine loads; whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import BadSpec, QuantizedTensor, StorageError, load_weights, quantize, save
from loaders.loading.save import Saved
from loaders.places import DEMO
from tests import passes
from tests.engines import mlx_lm_or_skip

torch = pytest.importorskip("torch")
SAVED = {
    "nf4": (), "int8": (), "hqq4": (), "w4a16": (), "fp8_block": (), "nvfp4a16": (), "ternary": (),
    "mlx_int4": (), "mlx_mixed_4_6": (), "mlx_mxfp4": (),
}  # fmt: skip
MATRIX = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return load_weights(DEMO)[0]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEMO / "config.json").read_text())
    return found


@pytest.mark.parametrize("preset", SAVED)
def test_it_is_what_a_job_writes(preset: str, demo: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "saved"
    save(quantize(demo, preset, config=config), out, config=config)
    job = passes.run(DEMO, tmp_path / "jobs", preset, settings=SAVED[preset])[preset]
    mine = passes.Written(out, json.loads((out / "config.json").read_text()))
    assert mine.tensors == job.tensors
    assert mine.config == job.config
    file = "qmodel.pt" if "hqq" in preset else "model.safetensors"
    names = {file, "config.json", *(["model.safetensors.index.json"] if "mlx" in preset else [])}
    assert {each.name for each in out.iterdir()} == names
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


@pytest.mark.engine
def test_transformers_loads_it(demo: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    save(quantize(demo, "nf4", config=config), tmp_path / "out", config=config)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)


@pytest.mark.engine
def test_hqq_loads_it(demo: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    base = pytest.importorskip("hqq.models.hf.base")
    made = quantize(demo, "hqq4", config=config)
    save(made, tmp_path / "out", config=config)
    model = base.AutoHQQHFModel.from_quantized(str(tmp_path / "out"), compute_dtype=torch.bfloat16, device="cpu")
    up = model.model.layers[0].mlp.up_proj
    mine = made["model.layers.0.mlp.up_proj.weight"].dequantize()
    assert torch.allclose(up.dequantize().float(), mine.float(), atol=1e-2)
    assert torch.equal(model.model.norm.weight, demo["model.norm.weight"])


@pytest.mark.engine
def test_mlx_lm_loads_it(demo: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    utils = mlx_lm_or_skip()
    save(quantize(demo, "mlx_int4", config=config), tmp_path / "out", config=config)
    model, _ = utils.load_model(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.bits == 4


def test_without_a_config_it_says_how_it_is_quantized_and_is_read_back(tmp_path: Path) -> None:
    made = quantize({"model.layers.0.mlp.up_proj.weight": MATRIX, "norm.weight": MATRIX[0]}, "nf4")
    save(made, tmp_path / "out")
    assert [*json.loads((tmp_path / "out" / "config.json").read_text())] == ["quantization_config"]
    back, _ = load_weights(tmp_path / "out", dtype="float32")
    assert torch.equal(
        back["model.layers.0.mlp.up_proj.weight"], made["model.layers.0.mlp.up_proj.weight"].dequantize()
    )
    assert torch.equal(back["norm.weight"], MATRIX[0])


def test_plain_tensors_are_saved_too_however_they_lie(tmp_path: Path) -> None:
    weights = {
        "a": MATRIX.t(),
        "b": np.arange(6, dtype=np.int64).reshape(2, 3),
        "c": MATRIX.bfloat16(),
        "d": np.float32(3),
    }
    save(weights, tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    back, _ = load_weights(tmp_path / "out")
    assert torch.equal(back["a"], MATRIX.t())
    assert back["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(back["c"], MATRIX.bfloat16())
    assert back["d"].item() == 3


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Saved) -> Any:
        yield b"the beginning"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Saved, "_chunks", full)
    with pytest.raises(StorageError, match="No space left"):
        save({"a": MATRIX}, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (lambda: {"a": quantize(MATRIX, "gguf_q4_0")}, "a: a tensor of llama.cpp's types is saved in a GGUF"),
        (
            lambda: {"a": quantize(MATRIX, "nf4"), "b": quantize(MATRIX, "hqq4")},
            "weights: expected tensors of one engine, found a for bitsandbytes, b for hqq",
        ),
        (
            lambda: {"layer.weight": quantize(MATRIX, "mlx_int4")},
            "config: a model without model_type is not one whose layers and names mlx-lm has; give its config.json",
        ),
        (lambda: quantize(MATRIX, "nf4"), "weights: expected tensors by name, found QuantizedTensor; save({"),
        (lambda: {"a": np.zeros((4, 4), np.uint16)}, "a: expected a dtype of weights, found numpy's uint16"),
        (lambda: {"a": 3}, "a: expected a tensor of torch or an array of numpy, found int"),
        (dict, "weights: expected some, found an empty mapping"),
    ],
    ids=["gguf", "two engines", "mlx without config", "no mapping", "bfloat16 of numpy", "no tensor", "nothing"],
)
def test_what_cannot_be_saved_so_is_refused_by_name(weights: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadSpec) as refused:
        save(weights(), tmp_path / "out")
    assert said in str(refused.value)
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_there_and_a_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match="path: expected a new folder"):
        save({"a": MATRIX}, tmp_path)
    with pytest.raises(BadSpec, match=r"a job writes to s3://"):
        save({"a": MATRIX}, "s3://bucket/out")


def test_a_config_for_which_it_was_not_quantized_is_refused(tmp_path: Path) -> None:
    made = quantize(MATRIX.bfloat16(), "int8", name="model.layers.0.mlp.up_proj.weight")
    other = {"model_type": "llama", "dtype": "float32"}
    weights = {made.name: quantize(MATRIX.bfloat16(), "nf4", name=made.name)}
    with pytest.raises(BadSpec, match="quantize it with the same config"):
        save(weights, tmp_path / "out", config=other)


def test_tied_weights_that_differ_are_both_saved(tmp_path: Path) -> None:
    config = {"model_type": "llama", "tie_word_embeddings": True}
    names = ("model.embed_tokens.weight", "lm_head.weight")
    same = {name: quantize(MATRIX, "w8a8", name=name) for name in names}
    save(same, tmp_path / "same", config=config)
    assert {*load_weights(tmp_path / "same")[0]} == {"model.embed_tokens.weight", "model.embed_tokens.weight_scale"}
    other = {**same, names[1]: quantize(2 * MATRIX, "w8a8", name=names[1])}
    save(other, tmp_path / "other", config=config)
    assert "lm_head.weight_scale" in load_weights(tmp_path / "other")[0]


def test_the_config_of_quantize_goes_along(demo: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    made = quantize(demo, "mlx_int4", config=config)
    save(made, tmp_path / "alone")
    save(dict(made), tmp_path / "given", config=config)
    one, other = ((tmp_path / name / "config.json").read_text() for name in ("alone", "given"))
    assert one == other
    assert json.loads(one)["model_type"] == "llama"


def test_a_config_may_be_transformers_own(demo: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own = transformers.LlamaConfig(**config)
    made = quantize(demo, "w4a16", config=own)
    save(made, tmp_path / "out", config=own)
    assert {n for n, t in made.items() if isinstance(t, QuantizedTensor)} == {
        n for n, t in quantize(demo, "w4a16", config=config).items() if isinstance(t, QuantizedTensor)
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    for wrong in (str(DEMO / "config.json"), transformers.LlamaConfig, 3):
        with pytest.raises(BadSpec, match=r"config: expected a model's config.json as a mapping, .* found "):
            save(made, tmp_path / "other", config=wrong)  # type: ignore[arg-type]
        with pytest.raises(BadSpec, match=r"config: expected a model's config.json as a mapping"):
            quantize(demo, "w4a16", config=wrong)  # type: ignore[call-overload]


def test_hqq_without_a_config_is_read_back(tmp_path: Path) -> None:
    made = quantize({"model.layers.0.mlp.up_proj.weight": MATRIX, "norm.weight": MATRIX[0]}, "hqq4")
    save(made, tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["qmodel.pt"]
    back, _ = load_weights(tmp_path / "out", dtype="float32")
    [name] = [each for each in made if "up_proj" in each]
    assert torch.allclose(back[name], made[name].dequantize("float32"), atol=1e-3)
    assert torch.equal(back["norm.weight"], MATRIX[0])


def test_what_the_engine_will_not_do_is_warned_of(tmp_path: Path) -> None:
    """As a job does: hqq under transformers 5 finds no experts."""
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight")
    made = quantize(dict.fromkeys(names[:1], MATRIX) | {names[1]: MATRIX.clone()}, "hqq4")
    with pytest.warns(UserWarning, match="hqq finds experts that lie one by one beside transformers 4 only"):
        save(made, tmp_path / "out")
