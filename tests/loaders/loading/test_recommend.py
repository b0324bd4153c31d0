"""jobs.recommend, and get_recommended_loader_config behind it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import completions, overview
from loaders import BadSpec, QuantizedTensor, get_recommended_loader_config, load_and_quantize
from loaders.loading.recommend import PRESETS, FittedPreset, _verdict
from loaders.places import DEMO
from tests.tiny_models import make

NAMES = sorted({name for names in PRESETS.values() for name in names})


@pytest.mark.parametrize("quant", NAMES)
def test_sizes_are_those_of_the_plan(quant: str, weightmill: Any) -> None:
    planned = weightmill("plan", f"model.path={DEMO}", f"quant={quant}", "format=json").document
    backend = next(name for name, names in PRESETS.items() if quant in names)
    found = get_recommended_loader_config(DEMO, backend, 100)
    [row] = [each for each in found.candidates if each.preset == quant]
    assert row.weight_bytes == planned["output"]["tensor_bytes"]
    assert row.bits_per_weight == pytest.approx(planned["output"]["bits_per_weight"])


def test_the_most_bits_that_fit_are_taken() -> None:
    everything = get_recommended_loader_config(DEMO, "cuda", 100)
    reserve = everything.reserve_bytes
    taken = []
    for each in everything.candidates:
        exactly = get_recommended_loader_config(DEMO, "cuda", (reserve + each.weight_bytes) / 1e9)
        assert exactly.candidates[len(taken)].weight_bytes == each.weight_bytes
        assert exactly.scheme == each.preset
        taken.append(exactly.scheme)
    assert taken == list(PRESETS["cuda"])
    less = get_recommended_loader_config(DEMO, "cuda", (reserve + everything.candidates[-1].weight_bytes - 1) / 1e9)
    assert less.scheme is None
    assert "nothing fits" in less.arithmetic[-1]
    with pytest.raises(BadSpec, match="nothing fits"):
        less.load_config()


def test_the_arithmetic_is_shown_and_right() -> None:
    found = get_recommended_loader_config(DEMO, "cuda", 24, context_tokens=4096)  # of which it has 512
    said = str(found)
    cache = 2 * 3 * 64 * 512 * 2  # keys and values, layers, heads by their size, tokens, bytes
    active = 512 * (8 * 256 + 3 * 512) * 2 + 1024 * 4
    assert found.reserve_bytes == cache + active + 1_000_000_000
    assert f"2 x 3 layers x 64 x 512 tokens x 2 bytes = {cache / 1e6:.2f} MB" in said
    assert "no more than 512 positions" in said
    assert found.workers >= 1
    assert found.strategy in said
    config = found.load_config()
    assert config.quantize is None


def test_a_recommendation_is_taken_as_the_settings_of_a_load() -> None:
    reserve = get_recommended_loader_config(DEMO, "cpu", 4).reserve_bytes
    advice = get_recommended_loader_config(DEMO, "cpu", (reserve + 2_500_000) / 1e9)
    assert advice.scheme == "gguf_q8_0"
    weights, _ = load_and_quantize(DEMO, advice)
    assert {type(each) for each in weights.values()} >= {QuantizedTensor}
    with pytest.raises(BadSpec, match="nothing fits"):
        load_and_quantize(DEMO, get_recommended_loader_config(DEMO, "cpu", reserve / 1e9))
    with pytest.raises(BadSpec, match=r"^config: expected a LoadConfig .*found \[1, 1.{60,80}$"):
        load_and_quantize(DEMO, [1] * 1000)


def test_fewer_tokens_are_advised_where_they_help() -> None:
    all_ = get_recommended_loader_config(DEMO, "cuda", 100, context_tokens=512)
    least = min(each.weight_bytes for each in all_.candidates if each.weight_bytes is not None)
    for tokens in (10**30, 512, 101):
        enough = get_recommended_loader_config(DEMO, "cuda", 100, context_tokens=100).reserve_bytes + least
        less = get_recommended_loader_config(DEMO, "cuda", enough / 1e9, context_tokens=tokens)
        assert less.arithmetic[-1].endswith(" more memory, or at most context_tokens=100")
        fits = get_recommended_loader_config(DEMO, "cuda", enough / 1e9, context_tokens=100)
        assert fits.scheme is not None
    never = get_recommended_loader_config(DEMO, "cuda", least / 1e9)
    assert never.arithmetic[-1].startswith("nothing fits: it takes ")
    assert never.arithmetic[-1].endswith(" more memory")


def test_what_the_engine_has_no_place_for_is_dropped_as_in_a_job(tmp_path: Path, weightmill: Any) -> None:
    model = make("bert", tmp_path / "model")
    planned = weightmill("plan", f"model.path={model}", "quant=gguf_q8_0", "format=json").document
    [row] = [each for each in get_recommended_loader_config(model, "cpu", 9).candidates if each.preset == "gguf_q8_0"]
    assert row.weight_bytes == planned["output"]["tensor_bytes"], row.why
    assert row.bits_per_weight == pytest.approx(planned["output"]["bits_per_weight"])


def headers_only(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A checkpoint whose bytes are a hole in a file."""
    folder.mkdir()
    header, at = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * {"BF16": 2, "F8_E4M3": 1, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama_shapes(hidden: int, inner: int, layers: int, keys: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, hidden),
        "lm_head.weight": (128256, hidden),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qo"}
        shapes |= {f"{name}self_attn.{part}_proj.weight": (keys, hidden) for part in "kv"}
        shapes |= {f"{name}mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (hidden, inner)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("hidden", "inner", "layers", "heads", "memory", "wanted"),
    [
        (4096, 14336, 32, 32, {("cuda", 24): "none", ("cuda", 12): "int8", ("cuda", 9): "nf4"}, "8B"),
        (8192, 28672, 80, 64, {("cuda", 80): "int8", ("cuda", 48): "nf4", ("mlx", 64): "mlx_mixed_4_6"}, "70B"),
    ],
)
def test_large_llamas_get_what_fits(
    hidden: int, inner: int, layers: int, heads: int, memory: dict[tuple[str, int], str], wanted: str, tmp_path: Path
) -> None:
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    folder = headers_only(tmp_path / wanted, config, llama_shapes(hidden, inner, layers, 1024))
    for (device, gigabytes), scheme in memory.items():
        assert get_recommended_loader_config(folder, device, gigabytes).scheme == scheme, (device, gigabytes)


def test_latent_attention_keeps_what_its_engine_keeps(tmp_path: Path) -> None:
    """DeepSeek V3's sizes: 61 layers, 128 heads of 128 + 64 and 128, latents of 512 + 64."""
    config = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 2,
    }  # fmt: skip
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"lm_head.weight": ("BF16", (1280, 7168))}
    shapes |= {f"model.layers.3.mlp.experts.{n}.up_proj.weight": ("BF16", (2048, 7168)) for n in range(2)}
    folder = headers_only(tmp_path / "m", config, shapes)
    small = "\n".join(get_recommended_loader_config(folder, "mlx", 64).arithmetic)
    assert f"61 layers x (512 + 64) x 8192 tokens x 2 bytes = {61 * 576 * 8192 * 2 / 1e9:.2f} GB" in small
    large = get_recommended_loader_config(folder, "cuda", 64)
    assert (
        f"61 layers x 128 heads x (128 + 64 + 128) x 8192 tokens x 2 bytes = {61 * 128 * 320 * 8192 * 2 / 1e9:.2f}"
        in ("\n".join(large.arithmetic))
    )
    bits = {each.preset: each.bits_per_weight or 0 for each in large.candidates}
    assert bits["w4a16"] < 8 < bits["nf4"]  # which leaves experts as they are


def test_a_number_of_parameters_is_estimated() -> None:
    found = get_recommended_loader_config(8_000_000_000, "cuda", 12)
    assert found.candidates[0].bits_per_weight == 16
    assert found.scheme == "int8"  # 8 GB and a little; 12 less 1 of runtime and 2.4, a fifth, leaves 8.6
    assert get_recommended_loader_config(8_000_000_000, "cuda", 8).scheme == "nf4"  # 4.5 GB; 5.4 are left
    assert "estimated" in str(found)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(BadSpec, match="backend: unknown 'abacus'"):
        get_recommended_loader_config(DEMO, "abacus")
    with pytest.raises(BadSpec, match="available_memory_gb: expected more than 0, found -1"):
        get_recommended_loader_config(DEMO, "cpu", -1)


@pytest.mark.quick
def test_the_verb_says_a_table_and_json(weightmill: Any) -> None:
    ran = weightmill("recommend", f"model.path={DEMO}", "backend=cuda", "backend.memory_gb=24")
    assert ran.status == 0, ran.err
    for part in ("24.00 GB for cuda", "hqq2", "taken", "quant=none strategy=", "room for weights"):
        assert part in ran.out
    document = weightmill(
        "recommend", f"model.path={DEMO}", "backend=mlx", "backend.memory_gb=0.5225", "format=json"
    ).document
    assert document["status"] == "done"
    assert document["scheme"] in PRESETS["mlx"]
    assert [row["preset"] for row in document["candidates"]] == list(PRESETS["mlx"])
    small = weightmill("recommend", f"model.path={DEMO}", "backend=cpu", "backend.memory_gb=0.1")
    assert small.status == 1
    assert "nothing fits" in small.out
    here = weightmill("recommend", f"model.path={DEMO}", "backend=cpu", "format=json").document
    assert here["available_bytes"] > 0


def test_the_verb_refuses_what_is_wrong(weightmill: Any) -> None:
    ran = weightmill("recommend", "backend.memory_gb=-1", "context_tokens=0", "nothing=1")
    assert ran.status == 2
    for name in ("backend.memory_gb", "context_tokens", "nothing"):
        assert name in ran.err
    assert "context_tokens" in weightmill("recommend", "--help").out


def test_the_verb_completes() -> None:
    assert "recommend" in overview()
    assert completions("weightmill rec") == ["recommend"]
    assert "backend.memory_gb=" in completions("weightmill recommend backend.m")
    assert completions("weightmill recommend backend=ml") == ["backend=mlx"]


def test_what_was_measured_says_what_loses_least(tmp_path: Path, weightmill: Any) -> None:
    root = f"output.root={tmp_path / 'o'}"
    asked = (str(DEMO), "backend=mlx", "backend.memory_gb=0.502", "context_tokens=64", root, "format=json")
    before = weightmill("recommend", *asked)
    assert before.document["measured"] is None
    ran = weightmill("run", f"model.path={DEMO}", "quant=auto", "quant.engine=mlx", "quant.target_bits=5", root)
    assert ran.status == 0, ran.err
    rows = weightmill("recommend", *asked).document["measured"]
    errors = [row["weighted_error"] for row in rows]
    assert errors == sorted(errors)
    assert rows[0]["quant"].startswith("quant=auto quant.engine=mlx quant.target_gb=")
    room = before.document["available_bytes"] - before.document["reserve_bytes"]
    assert all(row["bytes"] <= room for row in rows)
    assert {"mlx_int3", "mlx_int2"} <= {row["quant"] for row in rows}
    assert "mlx_int8" not in {row["quant"] for row in rows}


def test_a_smaller_source_that_is_taken_is_not_called_the_most_bits() -> None:
    stored = FittedPreset("none", 96, 5.7, True, "")
    more, fewer = FittedPreset("int8", 160, 9.7, True, ""), FittedPreset("nf4", 80, 5.0, True, "")
    assert "as the source stores it" in _verdict("none", [stored, more], 1000, 0)
    assert _verdict("none", [stored, fewer], 1000, 0) == "scheme none: the most bits per weight that fit"
