"""A loader made from a config: every setting does what it says, and the described calls run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loaders
from loaders import (
    BadCheckpoint,
    BadSpec,
    CheckpointLoader,
    CompressionStats,
    LoadConfig,
    QuantizedTensor,
    WeightLoaderConfig,
    create_aggressive_config,
    load_and_quantize,
    load_weights,
    preset,
)
from loaders.loading import resources as shared_module
from tests.making import Raw, write_safetensors

torch = pytest.importorskip("torch")
SHAPES = {"layer1.weight": (64, 128), "layer2.weight": (128, 256)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path) -> Iterator[Path]:
    before = list(shared_module._SHARED)
    loaders.configure(workers=2, cache_folder=tmp_path / "cache")
    yield tmp_path / "cache"
    shared_module._SHARED[:] = before


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {**made, "norm.weight": np.ones(64, np.float32)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A bare file of two layers and a norm, without a config."""
    path = tmp_path / "bare" / "model.safetensors"
    path.parent.mkdir()
    write_safetensors(path, {name: Raw("F32", value) for name, value in values().items()})
    return path


@pytest.fixture
def torch_file(tmp_path: Path) -> Path:
    path = tmp_path / "bare.pth"
    torch.save({name: torch.from_numpy(value).to(torch.bfloat16) for name, value in values().items()}, path)
    return path


def kinds(weights: dict[str, Any]) -> dict[str, str]:
    return {n: w.scheme.kind if isinstance(w, QuantizedTensor) else str(w.dtype) for n, w in weights.items()}


@pytest.mark.quick
def test_a_loader_quantizes_to_ternary_and_keeps_statistics(file: Path, tmp_path: Path) -> None:
    by = CheckpointLoader(WeightLoaderConfig())
    weights = by.load(file)
    assert kinds(weights) == {"layer1.weight": "ternary", "layer2.weight": "ternary", "norm.weight": "torch.float32"}
    stats = by.get_stats()
    assert stats.total_parameters == 64 * 128 + 128 * 256 + 64
    assert stats.compression_ratio == pytest.approx(stats.original_size_mb / stats.quantized_size_mb)
    assert stats.compression_ratio > 3.88  # what is published of these layers
    for name, value in list(values().items())[:2]:
        decoded = weights[name].dequantize("float32").numpy()
        layer = stats.layer_stats[name]
        assert layer["num_params"] == value.size
        assert layer["error"] == layer.mse == pytest.approx(float(np.mean((value - decoded) ** 2)), rel=1e-5)
        # Of weights that are normally distributed; 0.213 in the mean and 0.234 at most are published.
        assert layer.mse < 0.3
    assert stats.max_layer_mse == max(layer.mse for layer in stats.layer_stats.values())
    assert "2 layers: mean error" in repr(stats)
    by.save_stats(tmp_path / "report.json")
    assert CompressionStats.load(tmp_path / "report.json") == stats
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["total_parameters"] == stats.total_parameters
    assert said["layer_stats"]["layer1.weight"]["mse"] == pytest.approx(stats.layer_stats["layer1.weight"].mse)
    by.load(file, layer_filter=["layer1"])
    assert by.get_stats().total_parameters == stats.total_parameters + 64 * 128


def test_each_container_has_its_call_and_load_takes_any(file: Path, torch_file: Path) -> None:
    by = CheckpointLoader(WeightLoaderConfig(use_cache=False))
    assert list(by.load_safetensors(str(file), None, ["layer2"])) == ["layer2.weight"]
    assert kinds(by.load_pytorch(torch_file, False, ["norm"], "cpu")) == {"norm.weight": "torch.float32"}
    assert kinds(by.load_pytorch(torch_file, "nf4", map_location=torch.device("cpu")))["layer1.weight"] == "bnb4"
    assert set(by.load([file])) == set(by.load(torch_file))
    with pytest.raises(BadSpec, match=r"file_path: expected safetensors, found pytorch at .*load\(\) takes any"):
        by.load_safetensors(torch_file)
    with pytest.raises(BadSpec, match="file_path: expected pytorch, found safetensors"):
        by.load_pytorch(file)
    for call in (by.load, by.load_safetensors, by.load_pytorch):
        with pytest.raises(FileNotFoundError, match="none.safetensors"):
            call(file.with_name("none.safetensors"))


def test_every_setting_of_the_config_counts(file: Path, torch_file: Path, tmp_path: Path, own_cache: Path) -> None:
    def load(path: Path = file, **settings: Any) -> tuple[dict[str, Any], CheckpointLoader]:
        by = CheckpointLoader(WeightLoaderConfig(**settings))
        return by.load(path), by

    plain, by = load(quantize=False)
    assert kinds(plain)["layer1.weight"] == "torch.float32"
    assert (by.get_stats().compression_ratio, by.get_stats().layer_stats) == (1.0, {})
    assert by.get_stats().total_parameters == 64 * 128 + 128 * 256 + 64
    for given in ("float16", torch.float16, np.float16, np.dtype("float16")):
        assert kinds(load(quantize=False, dtype=given)[0])["norm.weight"] == "torch.float16"
    assert kinds(load(torch_file, quantize=False)[0])["norm.weight"] == "torch.float32"
    assert kinds(load(torch_file, quantize=False, dtype=None)[0])["norm.weight"] == "torch.bfloat16"
    assert kinds(load(quantization_config="nf4")[0])["layer1.weight"] == "bnb4"
    named = CheckpointLoader(WeightLoaderConfig("nf4"))
    assert kinds(named.load(file, True)) == kinds(named.load(file))
    wide = preset("nf4", group_size=128)
    assert load(quantization_config=wide)[0]["layer1.weight"].scheme == wide.scheme
    assert load(compute_error=False, use_cache=False)[1].get_stats().total_error == 0
    assert any("not measured" in note for note in load(compute_error=False, use_cache=False)[1].notes)
    # The cache: in its own folder, and in the process's; not without.
    loaders.clear_cache()
    load(use_cache=False)
    assert not list(own_cache.glob("*.safetensors"))
    _, by = load(cache_dir=tmp_path / "mine")
    assert len(list((tmp_path / "mine").glob("*.safetensors"))) == 1
    assert not list(own_cache.glob("*.safetensors"))
    assert by.clear_cache() > 0
    assert not list((tmp_path / "mine").glob("*.safetensors"))
    load()
    assert list(own_cache.glob("*.safetensors"))
    # Shapes by name are what must be there.
    load(validate_shapes={**SHAPES, "norm.weight": (64,)})
    with pytest.raises(BadCheckpoint, match=r"layer1.weight: expected \[3\], found \[64, 128\]"):
        load(validate_shapes={**SHAPES, "layer1.weight": (3,), "norm.weight": (64,)})


def test_shapes_that_are_not_the_headers_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loaders.loading import checkpoint_loader as module

    def wrong(*given: Any) -> Any:
        weights, stats = load_and_quantize(*given)
        part = dict(weights["layer1.weight"].parts)
        role = next(iter(part))
        part[role] = part[role][1:]
        weights["layer1.weight"] = QuantizedTensor(
            name="layer1.weight", scheme=weights["layer1.weight"].scheme, spec=weights["layer1.weight"].spec,
            parts=part, stored=weights["layer1.weight"].stored,
        )  # fmt: skip
        weights["norm.weight"] = weights["norm.weight"][:5]
        return weights, stats

    monkeypatch.setattr(module, "load_and_quantize", wrong)
    with pytest.raises(BadCheckpoint) as caught:
        CheckpointLoader(WeightLoaderConfig()).load(file)
    assert "layer1.weight: weight expected 2048 bytes, found 2047" in str(caught.value)
    assert "norm.weight: expected [64], found [5]" in str(caught.value)
    assert CheckpointLoader(WeightLoaderConfig(validate_shapes=False)).load(file)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"quantization_config": "nf5"}, "quantize: .*nf5"),
        ({"device": "gpu"}, "device: expected one of"),
        ({"auto_aggressive": True, "quantization_config": "nf4"}, "auto_aggressive: it is a quantization of its own"),
        ({"use_cache": "yes"}, "use_cache"),
    ],
)
@pytest.mark.quick
def test_a_wrong_setting_is_refused_when_the_config_is_made(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSpec, match=said):
        WeightLoaderConfig(**settings)


def test_aggressive_works_on_a_file_without_a_config(file: Path) -> None:
    ways = [
        lambda: load_weights(file, "ternary_aggressive"),
        lambda: load_weights(file, True, True, "cpu"),
        lambda: load_weights(str(file), quantize=True, aggressive=True, device="cpu"),
        lambda: load_weights(file, aggressive=True),
        lambda: load_and_quantize(file, config=create_aggressive_config()),
        lambda: load_and_quantize(file, WeightLoaderConfig(auto_aggressive=True)),
        lambda: load_and_quantize(file, WeightLoaderConfig(True, CheckpointLoader.create_aggressive_config())),
    ]
    for way in ways:
        weights, stats = way()
        assert kinds(weights) == {
            "layer1.weight": "ternary",  # 128 columns do not fill a block of 256
            "layer2.weight": "ggml",
            "norm.weight": "torch.float32",
        }
        assert weights["layer2.weight"].scheme.type == "TQ2_0"
        assert stats.compression_ratio > 15
        said = "layer1.weight: rows do not divide into TQ2_0's blocks of 256; stored as BitNet's packed ternary"
        assert said in stats.notes
        assert any("types are chosen by the names" in note for note in stats.notes)
    loader = CheckpointLoader(WeightLoaderConfig(auto_aggressive=True))
    loader.load(file)
    assert any("stored as BitNet's" in note for note in loader.notes)
    (file.parent / "config.json").write_text('{"model_type": "bitnet"}')
    assert any("llama.cpp has no such model" in note for note in load_weights(file, aggressive=True)[1].notes)


def test_embeddings_and_heads_without_a_config_are_known_by_their_names(tmp_path: Path) -> None:
    wide = np.random.default_rng(1).standard_normal((32, 256)).astype(np.float32)
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight", "odd.weight")
    odd = {"odd.weight": Raw("F32", np.ones((3, 128), np.float32))}
    write_safetensors(tmp_path / "m.safetensors", {**{name: Raw("F32", wide) for name in names}, **odd})
    weights, _ = load_weights(tmp_path / "m.safetensors", "ternary_aggressive")
    found = {n: getattr(getattr(w, "scheme", None), "type", None) for n, w in weights.items()}
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == "Q4_K"
    assert found["model.layers.0.mlp.up_proj.weight"] == "TQ2_0"
    assert found["odd.weight"] == "Q4_0"  # three rows are no multiple of four
    assert load_weights(tmp_path / "m.safetensors", "gguf_q8_0")[0]["lm_head.weight"].scheme.type == "Q8_0"


def test_true_is_nf4_in_load_weights_and_positions_are_taken(file: Path) -> None:
    weights, stats = load_weights(file, True, False, torch.device("cpu"))
    assert kinds(weights)["layer1.weight"] == "bnb4"
    figures = (stats.total_parameters, stats.original_size_mb, stats.quantized_size_mb, stats.compression_ratio)
    of = stats.compression
    assert of is not None
    assert figures == (of.total_parameters, of.original_size_mb, of.quantized_size_mb, of.compression_ratio)
    assert (stats.total_error, stats.mean_layer_error, stats.max_layer_error) == (
        of.total_error, of.mean_layer_error, of.max_layer_error,
    )  # fmt: skip
    assert set(stats.layer_stats) == {"layer1.weight", "layer2.weight"}
    assert kinds(load_and_quantize(file)[0])["layer1.weight"] == "bnb4"
    assert load_weights(file, preset("fp4"))[0]["layer1.weight"].scheme == preset("fp4").scheme
    assert load_weights(file)[1].compression_ratio == 1.0
    for wrong in ("nf4", False):
        with pytest.raises(BadSpec, match="aggressive: it is quantize='ternary_aggressive', found quantize="):
            load_weights(file, wrong, aggressive=True)
    with pytest.raises(BadSpec, match="settings: they are of a preset by its name"):
        LoadConfig(quantize=preset("hqq4"), settings={"group_size": 64})
    with pytest.raises(BadSpec, match="config: expected a LoadConfig"):
        load_and_quantize(file, 7)  # type: ignore[arg-type]
