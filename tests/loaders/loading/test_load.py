"""load_weights: any container, filters, quantization on the way, the cache, checks."""

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
    LoadConfig,
    QuantizedTensor,
    VerifyFailed,
    clear_cache,
    configure,
    load_and_quantize,
    load_weights,
)
from loaders.backends.threads import THREAD_BYTES
from loaders.loading import encode
from loaders.loading import resources as shared_module
from loaders.storage import local
from tests.making import llama_tensors, read_safetensors, values_of, weights, write_checkpoint

torch = pytest.importorskip("torch")
UP = "model.layers.0.mlp.up_proj.weight"
LINEAR = 14


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, and two workers."""
    before = list(shared_module._SHARED)
    loaders.configure(workers=2, cache_folder=tmp_path / "cache")
    yield tmp_path / "cache"
    shared_module._SHARED[:] = before


def bits(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def test_every_name_of_the_library_is_there() -> None:
    for name in loaders.__all__:
        assert getattr(loaders, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        loaders.nothing  # noqa: B018
    assert set(loaders.__all__) <= set(dir(loaders))


@pytest.mark.quick
def test_plain_weights_are_the_files_own_bytes(source: Path) -> None:
    found, stats = load_weights(source)
    assert {n: bits(t) for n, t in found.items()} == {n: r.data.tobytes() for n, r in llama_tensors().items()}
    assert stats.compression is None
    assert stats.load.tensors == 21
    assert stats.load.throughput_gbps > 0


def test_one_file_is_enough_whatever_it_is_called(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[0]
    other = tmp_path / "odd.weights"
    other.write_bytes(shard.read_bytes())
    found, _ = load_weights(other)
    every = {n: r.data.tobytes() for n, r in llama_tensors().items()}
    assert 0 < len(found) < 21
    assert all(bits(tensor) == every[name] for name, tensor in found.items())


@pytest.mark.parametrize(
    ("wanted", "count"), [("mlp.", 6), ("*.mlp.up_proj.weight", 2), (["norm", "lm_head*"], 6), ("model.layers.0.*", 9)]
)
def test_a_filter_takes_parts_of_names_and_patterns(wanted: Any, count: int, source: Path) -> None:
    assert len(load_weights(source, layer_filter=wanted)[0]) == count
    assert len(load_weights(source, "nf4", layer_filter=wanted)[0]) == count


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_filter_that_takes_nothing_is_refused(quantize: str | None, source: Path) -> None:
    with pytest.raises(BadSpec, match="layer_filter: 'nothing' matches none of 21 tensors, such as '"):
        load_weights(source, quantize, layer_filter="nothing")


@pytest.mark.parametrize("quant", ["nf4", "int8", "hqq4", "w4a16", "nvfp4a16", "mlx_int4", "ternary"])
def test_what_is_quantized_is_what_a_job_stores(quant: str, source: Path, tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    output = ["output=hf"] if quant == "hqq4" else []
    settings = {"group_size": 32} if quant == "w4a16" else {}
    output += [f"quant.{key}={value}" for key, value in settings.items()]
    ran = weightmill("run", f"model.path={source}", f"output.path={out}", f"quant={quant}", *output, "format=json")
    assert ran.status == 0, ran.err
    stored = read_safetensors(out)
    found, stats = load_weights(source, quant, settings=settings)
    quantized = {n: t for n, t in found.items() if isinstance(t, QuantizedTensor)}
    assert len(quantized) >= LINEAR
    for tensor in quantized.values():
        for name, part in tensor.tensors().items():
            assert bits(part) == stored[name].data.tobytes(), name
            assert tuple(part.shape) == stored[name].data.shape or part.dim() == 0, name
    for row in ran.document["tensors"]:
        if row["name"] in quantized:
            layer = stats.compression.layer_stats[row["name"]]
            assert layer.error.relative_error == pytest.approx(row["relative_error"], rel=1e-6)
    total = ran.document["totals"]
    assert stats.compression.output_bytes == sum(t.nbytes for t in found.values())
    assert stats.compression.total_parameters == total["parameters"]


@pytest.mark.parametrize("quant", ["gguf_q4_k_m", "gguf_q8_0"])
def test_ggml_blocks_decode(quant: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    matrix = weights(rng.standard_normal((64, 256)).astype(np.float32), "F32")
    root = write_checkpoint(tmp_path / "m", {UP: matrix})
    found, stats = load_weights(root, quant)
    error = np.abs(found[UP].dequantize("float32").numpy() - matrix.data).max()
    assert error < 0.6
    assert stats.compression.max_layer_error < 0.1


@pytest.mark.quick
def test_true_is_nf4_and_a_tensor_says_what_it_is(source: Path) -> None:
    found, stats = load_weights(source, True)
    tensor = found[UP]
    error = stats.compression.layer_stats[UP].error.relative_error
    about = f"{UP}, bnb4, 128x64 of bfloat16, {tensor.nbytes:,} bytes, relative error {error:.3g}"
    assert repr(tensor) == f"QuantizedTensor({about})"
    assert (tensor.shape, tensor.dtype.name, tensor.numel()) == ((128, 64), "BF16", 128 * 64)
    whole = tensor.dequantize("float32")
    assert whole.dtype is torch.float32
    assert tensor.dequantize().dtype is torch.bfloat16
    assert tensor.dequantize(torch.float16).dtype is torch.float16
    flat = whole.reshape(-1)
    for start, stop in ((0, 1), (63, 65), (100, 5000), (8191, 8192), (7, 7)):
        assert torch.equal(tensor.dequantize_range(start, stop, "float32"), flat[start:stop])
    source_values = values_of(llama_tensors()[UP])
    error = np.sqrt(((whole.numpy() - source_values) ** 2).sum() / (source_values**2).sum())
    assert stats.compression.layer_stats[UP].error.relative_error == pytest.approx(error, rel=1e-4)
    with pytest.raises(BadSpec, match="not within its 8192 weights"):
        tensor.dequantize_range(0, 8193)
    with pytest.raises(BadSpec, match="dtype: expected float32, float16 or bfloat16, found int3"):
        tensor.dequantize("int3")


def test_a_dtype_casts_floats_and_decodes_what_was_quantized(source: Path, tmp_path: Path, weightmill: Any) -> None:
    wide, _ = load_weights(source, dtype=torch.float32)
    for name, raw in llama_tensors().items():
        assert np.array_equal(wide[name].numpy(), values_of(raw))
    for quant in ("nf4", "hqq8", "int8", "fp8_dynamic"):
        out = tmp_path / quant
        assert weightmill("run", f"model.path={source}", f"output.path={out}", f"quant={quant}").status == 0
        stored, stats = load_weights(out)
        assert len(stored) > 21 or quant == "hqq8"
        assert "as stored" in stats.notes[0]
        decoded, _ = load_weights(out, dtype="float32")
        direct, _ = load_weights(source, quant)
        assert torch.equal(decoded[UP], direct[UP].dequantize("float32")), quant
        again, _ = load_weights(out, "hqq4")
        assert isinstance(again[UP], QuantizedTensor)


@pytest.mark.quick
def test_the_cache_gives_the_same_by_content_and_scheme(source: Path, own_cache: Path, tmp_path: Path) -> None:
    first, one = load_weights(source, "nf4", use_cache=True)
    second, two = load_weights(source, "nf4", use_cache=True)
    assert (one.from_cache, two.from_cache) == (False, True)
    assert two.compression == one.compression
    for name, tensor in first.items():
        if isinstance(tensor, QuantizedTensor):
            assert {r: p.tobytes() for r, p in tensor.parts.items()} == {
                r: p.tobytes() for r, p in second[name].parts.items()
            }
            assert torch.equal(tensor.dequantize("float32"), second[name].dequantize("float32"))
        else:
            assert torch.equal(tensor, second[name])
    assert not load_weights(source, "nf4", settings={"group_size": 128}, use_cache=True)[1].from_cache
    assert load_weights(source, dtype="float32", use_cache=True)[1].from_cache is False
    assert load_weights(source, dtype="float32", use_cache=True)[1].from_cache is True
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    for path in (p for p in source.iterdir() if p.is_file()):
        (elsewhere / path.name).write_bytes(path.read_bytes())
    assert load_weights(elsewhere, "nf4", use_cache=True)[1].from_cache
    changed = llama_tensors(seed=1)
    write_checkpoint(elsewhere, changed, shards=3)
    assert not load_weights(elsewhere, "nf4", use_cache=True)[1].from_cache
    size = shared_module.shared().cache.size_bytes
    assert size > 0
    (own_cache / "mine.json").write_text("{}")
    assert clear_cache() == size
    assert (own_cache / "mine.json").exists()
    assert second[UP].dequantize().shape == (128, 64)  # its map outlives the file
    assert not load_weights(source, "nf4", use_cache=True)[1].from_cache


@pytest.mark.parametrize("place", [9, 0.3, 0.6, 0.9, -1])
def test_a_bit_that_an_entry_loses_makes_it_absent(source: Path, own_cache: Path, place: float) -> None:
    load_weights(source, "nf4", use_cache=True)
    [data] = own_cache.glob("*.safetensors")
    raw = bytearray(data.read_bytes())
    raw[place if isinstance(place, int) else int(len(raw) * place)] ^= 4
    data.write_bytes(raw)
    assert not load_weights(source, "nf4", use_cache=True)[1].from_cache
    assert data.read_bytes() != raw
    assert load_weights(source, "nf4", use_cache=True)[1].from_cache


def test_a_damaged_entry_is_made_again(source: Path, own_cache: Path) -> None:
    load_weights(source, "nf4", use_cache=True)
    [entry] = own_cache.glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-100])
    assert not load_weights(source, "nf4", use_cache=True)[1].from_cache
    assert load_weights(source, "nf4", use_cache=True)[1].from_cache


@pytest.mark.usefixtures("own_cache")
def test_what_a_gpu_searched_is_kept_apart_from_the_cpus(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loaders.quantization.kernels.torch_device import DeviceKernels

    kernels_of = encode.kernels_of
    monkeypatch.setattr(encode, "kernels_of", lambda name: DeviceKernels("cpu") if name == "cuda" else kernels_of(name))
    for quantize, is_same in (("nf4", True), ("hqq4", False)):
        first, _ = load_weights(source, quantize, use_cache=True)
        second, found = load_weights(source, quantize, use_cache=True, backend="cuda")
        assert found.from_cache is is_same
        assert first.keys() == second.keys()
        assert load_weights(source, quantize, use_cache=True, backend="cuda")[1].from_cache


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at /proc")
def test_a_tensor_beyond_the_budget_is_quantized_within_the_stated_bound(tmp_path: Path) -> None:
    """128 MB of bfloat16 under a budget of 32 MB: the result, and what `make` says of a thread."""
    rows, columns = 8192, 8192
    raw = json.dumps({"a.weight": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw.encode())
        file.truncate(8 + len(raw) + 2 * rows * columns)
    configure(workers=2, memory_budget_mb=32)
    slack = 8_000_000  # threads, the interpreter
    load_weights(tmp_path, "nf4", layer_filter="a.weight")  # the first brings libraries
    weights, stats = load_weights(tmp_path, "nf4")
    result = weights["a.weight"].nbytes
    assert result == pytest.approx(rows * columns * 4.5 / 8, rel=0.01)
    assert stats.load.peak_anonymous_bytes <= result + 2 * THREAD_BYTES + slack < 2 * rows * columns
    assert stats.load.bytes == 2 * rows * columns
    _, stats = load_weights(tmp_path)
    assert stats.load.peak_anonymous_bytes <= slack


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, None])
def test_stats_say_cold_or_warm_when_quantizing_too(
    share: float | None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "cached_share", lambda path: share)
    _, stats = load_weights(source, "nf4", measure=False)
    wanted = {0.0: "cold", 0.3: "mixed", 1.0: "warm", None: "unknown"}[share]
    assert stats.load.temperature == wanted
    assert stats.load.warm_bytes + stats.load.cold_bytes == (0 if share is None else stats.load.bytes)
    assert wanted in str(stats)


def test_nan_and_errors_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors[UP].data[3, 5] = 0x7FC0
    root = write_checkpoint(tmp_path / "m", tensors)
    with pytest.raises(VerifyFailed, match=r"up_proj.*holds 1 NaN.*with allow_nonfinite=True"):
        load_weights(root, "nf4")
    assert load_weights(root, "nf4", allow_nonfinite=True)[0]
    assert load_weights(root)[0]
    with pytest.raises(VerifyFailed, match="up_proj.weight: 1 NaN or infinite weights"):
        load_weights(root, check_finite=True)
    with pytest.raises(VerifyFailed, match="at most 0.001 allowed .the worst of "):
        load_weights(root, "nf4", allow_nonfinite=True, max_relative_error=0.001)


def test_shapes_are_those_that_were_expected(source: Path) -> None:
    shapes = {name: raw.data.shape for name, raw in llama_tensors().items()}
    assert load_weights(source, "nf4", expected_shapes=shapes)[0]
    wrong = {**shapes, UP: (64, 128), "more": (3,)}
    del wrong["lm_head.weight"]
    with pytest.raises(BadCheckpoint) as caught:
        load_weights(source, expected_shapes=wrong)
    said = str(caught.value)
    assert "3 weights are not as expected" in said
    assert f"{UP}: expected [64, 128], found [128, 64]" in said
    assert "more: missing, expected [3]" in said
    assert "lm_head.weight: not expected, found [96, 64]" in said


def test_a_config_is_strict(source: Path) -> None:
    with pytest.raises(BadSpec) as caught:
        load_and_quantize(source, {"quantise": "nf4", "device": "abacus", "max_relative_error": -1})
    said = str(caught.value)
    assert "quantise" in said
    assert "device" in said
    assert "max_relative_error" in said
    with pytest.raises(BadSpec, match="unknown 'nf5'; did you mean 'nf4'\\?; known: fp4"):
        load_weights(source, "nf5")
    with pytest.raises(BadSpec, match="group_size"):
        load_weights(source, "nf4", settings={"group_size": 63})
    with pytest.raises(ValueError, match="frozen"):
        LoadConfig().device = "cuda"  # type: ignore[misc]
    with pytest.raises(BadSpec, match="found nothing there"):
        load_weights(source / "nothing")


def test_loads_side_by_side_share_workers_and_budget(source: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    together = loaders.configure(workers=2, memory_budget_mb=1)  # less than one load wants: one after another
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda quant: load_weights(source, quant)[1], ["nf4", "hqq4", "int8"]))
    assert all(stats.compression.layer_stats for stats in results)
    assert together.budget.used == 0


def test_all_strategies_that_read_ranges_give_the_same(source: Path) -> None:
    wanted = bits(load_weights(source, "nf4")[0][UP].dequantize("float32"))
    for strategy in ("lazy", "read", "multithread", "streaming"):
        assert bits(load_weights(source, "nf4", strategy=strategy)[0][UP].dequantize("float32")) == wanted
