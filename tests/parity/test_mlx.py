"""Held against mlx-lm itself: the same bytes from its quantizer, the same checkpoint, the same logits."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.architectures import mlx
from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.places import DEMO
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.mlx_affine import BITS, GROUP_SIZES, MlxAffine
from loaders.quantization.schemes.mlx_float import MlxFloat
from tests import reference
from tests.encoding import MemorySink, MemoryView
from tests.engines import mlx_lm_or_skip
from tests.making import Raw, read_safetensors, values_of, weights, write_checkpoint, write_safetensors
from tests.quick import some_quick

mx = pytest.importorskip("mlx.core")
mlx_utils = mlx_lm_or_skip()
mlx_convert = pytest.importorskip("mlx_lm.convert")
pytestmark = pytest.mark.engine

MX_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@pytest.fixture(autouse=True)
def _on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


def mlx_array(raw: Raw) -> Any:
    return mx.array(raw.data).view(mx.bfloat16) if raw.dtype == "BF16" else mx.array(raw.data)


def bytes_of(array: Any) -> bytes:
    return np.array(array.view(mx.uint8) if array.size else array).tobytes()


def encoded(scheme: Scheme, raw: Raw) -> dict[str, np.ndarray]:
    view = MemoryView(raw)
    sink = MemorySink(scheme, view.spec)
    with Crew(1) as crew:
        scheme.encode(view, sink, ThreadedWork(kernels_of("cpu"), crew, threading.Event()))
    return sink.stored


def awkward() -> np.ndarray:
    """Rows ordinary, zero, minus zero, tiny, huge, sparse, one-signed, constant, with ties."""
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((40, 256)) * 0.02).astype(np.float32)
    rows[0], rows[1], rows[9], rows[16] = 0, -0.0, 0.01, -0.01
    for row, factor in ((2, 1e-30), (3, 1e20), (10, 1e-36), (12, 1e-43), (13, 1e-6), (14, 1e-5), (15, 1e-7)):
        rows[row] *= np.float32(factor)
    rows[4, ::7], rows[17, ::2], rows[17, 1::2] = 0, 0.0, -0.0
    rows[5], rows[6] = np.abs(rows[5]), -np.abs(rows[6])
    rows[7, 5::64], rows[7, 9::64] = 0.5, -0.5
    rows[8] = np.round(rows[8] * 256) / 256
    rows[11, 3::64] *= 100
    rows[18] += 1
    rows[19] -= 1
    rows[20] = np.round(rows[20] * 512)
    return rows


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", sorted(MX_DTYPES))
def test_codes_scales_and_biases_are_those_of_mx_quantize(dtype: str, bits: int, group: int) -> None:
    ordinary = np.random.default_rng(bits).standard_normal((64, 256)).astype(np.float32)
    with np.errstate(over="ignore"):
        rows = np.concatenate([awkward(), ordinary])
        raw = weights(np.clip(rows, -6e4, 6e4) if dtype == "F16" else rows, dtype)
    wanted = mx.quantize(mlx_array(raw), group_size=group, bits=bits)
    mine = encoded(MlxAffine(bits, group), raw)
    for role, array in zip(("weight", "weight_scales", "weight_biases"), wanted, strict=True):
        assert mine[role].tobytes() == bytes_of(array), role


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("dtype", sorted(MX_DTYPES))
def test_small_floats_and_their_scales_are_those_of_mx_quantize(dtype: str, mode: Any) -> None:
    rng, scheme = np.random.default_rng(7), MlxFloat(mode)
    rows = np.concatenate([awkward(), rng.standard_normal((64, 256)) * np.exp2(rng.uniform(-12, 3, (64, 1)))])
    rows[[2, 3, 10, 12]] = 0  # beyond what MLX's scales hold: see the next test
    rows[40:44] = np.round(rows[40:44] * 64) / 8
    raw = weights(rows, dtype)
    codes, scales = mx.quantize(mlx_array(raw), group_size=scheme.group_size, bits=scheme.bits, mode=mode)
    mine = encoded(scheme, raw)
    assert mine["weight_scales"].tobytes() == bytes_of(scales)
    assert mine["weight"].tobytes() == bytes_of(codes)


def test_small_floats_beyond_what_a_scale_holds_stay_finite() -> None:
    """Where MLX's exponent wraps around to infinities, and its nvfp4 gives zeros for the greatest weights."""
    rows = np.zeros((2, 64), np.float32)
    rows[0, 0], rows[1, 0] = 1e-40, 1e30
    for mode, wanted in (("mxfp4", [0.0, 2.0**100]), ("mxfp8", [0.0, 1e30]), ("nvfp4", [0.0, 6 * 448.0])):
        scheme = MlxFloat(mode)
        stored = {f"w.{role}": Raw(p.dtype.name, encoded(scheme, Raw("F32", rows))[role].reshape(p.shape))
                  for role, p in scheme.stored(MemoryView(Raw("F32", rows)).spec).items()}  # fmt: skip
        decoded = reference.decode_mlx_float(stored, "w", scheme.bits, scheme.mode)
        assert np.isfinite(decoded).all()
        assert decoded[:, 0] == pytest.approx(wanted, rel=0.3, abs=1e-37)


# --- checkpoints

HIDDEN, INNER, HEADS, KV, VOCABULARY, LAYERS, EXPERTS, EXPERT_INNER = 128, 192, 4, 2, 96, 2, 4, 64
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
QWEN_MOE = {
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_INNER,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "head_dim": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": QWEN_MOE,
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
}


def model_tensors(kind: str, dtype: str, *, tied: bool, hidden: int = HIDDEN, inner: int = INNER) -> dict[str, Raw]:
    """Random weights of a small model, by transformers' names."""
    rng, shapes = np.random.default_rng(5), {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    head_dim = MODELS[kind].get("head_dim", hidden // HEADS)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        for part, rows in (("q", HEADS), ("k", KV), ("v", KV)):
            shapes[f"{name}self_attn.{part}_proj.weight"] = (rows * head_dim, hidden)
            if kind == "qwen2":
                shapes[f"{name}self_attn.{part}_proj.bias"] = (rows * head_dim,)
        shapes[f"{name}self_attn.o_proj.weight"] = (hidden, HEADS * head_dim)
        if kind.startswith("qwen3"):
            shapes |= {f"{name}self_attn.{part}_norm.weight": (head_dim,) for part in "qk"}
        shapes |= {f"{name}{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
        if kind == "qwen3_moe":
            shapes[name + "mlp.gate.weight"] = (EXPERTS, hidden)
            for expert in range(EXPERTS):
                shapes |= _mlp(
                    f"{name}mlp.experts.{expert}.", hidden, EXPERT_INNER, ("gate_proj", "up_proj", "down_proj")
                )
        elif kind == "mixtral":
            shapes[name + "block_sparse_moe.gate.weight"] = (EXPERTS, hidden)
            for expert in range(EXPERTS):
                shapes |= _mlp(f"{name}block_sparse_moe.experts.{expert}.", hidden, inner, ("w1", "w3", "w2"))
        else:
            shapes |= _mlp(name + "mlp.", hidden, inner, ("gate_proj", "up_proj", "down_proj"))
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, hidden)
    return {
        name: weights(rng.standard_normal(shape) * 0.05 + (len(shape) == 1), dtype) for name, shape in shapes.items()
    }


def _mlp(prefix: str, hidden: int, inner: int, names: tuple[str, str, str]) -> dict[str, tuple[int, ...]]:
    gate, up, down = names
    wide, narrow = (inner, hidden), (hidden, inner)
    return {f"{prefix}{gate}.weight": wide, f"{prefix}{up}.weight": wide, f"{prefix}{down}.weight": narrow}


def write_model(
    folder: Path, kind: str, dtype: str = "BF16", *, tied: bool = False, theta: float = 5e5, **sizes: int
) -> dict[str, Any]:
    """A checkpoint with the config.json of transformers 5. Gives the config as mlx-lm wants it."""
    config = {
        **SIZES, **MODELS[kind], "model_type": kind, "architectures": ["AnyForCausalLM"], "tie_word_embeddings": tied,
        "dtype": MX_DTYPES[dtype], "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
    }  # fmt: skip
    config |= {{"hidden": "hidden_size", "inner": "intermediate_size"}[name]: size for name, size in sizes.items()}
    write_checkpoint(folder, model_tensors(kind, dtype, tied=tied, **sizes), config=config, shards=3)
    older = {**config, "rope_theta": theta, "head_dim": config.get("head_dim", config["hidden_size"] // HEADS)}
    return older | ({"num_experts": EXPERTS} if kind == "qwen3_moe" else {})


def theirs(source: Path, out: Path, config: dict[str, Any], recipe: str | None = None, **settings: Any) -> Any:
    """mlx-lm's own conversion, without the tokenizer. Gives its model."""
    model, config = mlx_utils.load_model(source, model_config=config)
    predicate = mlx_convert.mixed_quant_predicate_builder(recipe, model, 64) if recipe else None
    settings = {"group_size": None, "bits": None, **settings}
    model, config = mlx_utils.quantize_model(model, config, quant_predicate=predicate, **settings)
    mlx_utils.save_model(out, model)
    mlx_utils.save_config(config, out / "config.json")
    return model


def logits(model: Any) -> np.ndarray:
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (1, 9))
    return np.array(model(mx.array(ids)).astype(mx.float32))


def named(block: dict[str, Any]) -> dict[str, Any]:
    """A quantization block's modules that differ from the rest, with all their settings."""
    base = {key: value for key, value in block.items() if not isinstance(value, dict)}
    paths = {path: {"mode": "affine", **value} for path, value in block.items() if isinstance(value, dict)}
    return {"": base} | {path: value for path, value in paths.items() if value != base}


def check_same(ours: Path, peer: Path, model: Any) -> None:
    """The same tensors, the same settings, and mlx-lm computes the same from both."""
    mine, wanted = read_safetensors(ours), read_safetensors(peer)
    assert set(mine) == set(wanted)
    for name, raw in wanted.items():
        assert (mine[name].dtype, mine[name].data.shape) == (raw.dtype, raw.data.shape), name
        assert mine[name].data.tobytes() == raw.data.tobytes(), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, peer)]
    if any(
        name.endswith(".scales") for name in mine
    ):  # where nothing is quantized, mlx-lm writes the block all the same
        assert named(configs[0]["quantization"]) == named(configs[1]["quantization"])
        assert configs[0]["quantization_config"] == configs[0]["quantization"]
    assert all(configs[0][key] == value for key, value in configs[1].items() if not key.startswith("quantization"))
    about = [json.loads((f / "model.safetensors.index.json").read_text())["metadata"] for f in (ours, peer)]
    assert about[0] == about[1]
    loaded, _ = mlx_utils.load_model(ours)
    assert np.array_equal(logits(loaded), logits(model))
    for path in ours.glob("*.safetensors"):
        assert mx.load(str(path), return_metadata=True)[1] == {"format": "mlx"}


Run = Callable[..., Any]
CASES: dict[str, tuple[str, dict[str, Any], list[str], dict[str, Any]]] = {
    "llama int4": ("llama", {}, ["quant=mlx_int4"], {}),
    "llama tied int4": ("llama", {"tied": True}, ["quant=mlx_int4"], {}),
    "llama untied int8": ("llama", {}, ["quant=mlx_int8"], {"bits": 8}),
    "llama odd sizes int8": ("llama", {"inner": 200}, ["quant=mlx_int8"], {"bits": 8}),
    "llama tied int8 fp16": ("llama", {"tied": True, "dtype": "F16"}, ["quant=mlx_int8"], {"bits": 8}),
    "llama fp32 3 bits g32": (
        "llama", {"dtype": "F32"}, ["quant=mlx_int4", "quant.bits=3", "quant.group_size=32"],
        {"bits": 3, "group_size": 32},
    ),
    "llama odd sizes": ("llama", {"inner": 200}, ["quant=mlx_int4"], {}),
    "llama nothing divides": ("llama", {"hidden": 72, "inner": 200}, ["quant=mlx_int4"], {}),
    "mistral 2 bits g128": (
        "mistral", {}, ["quant=mlx_int4", "quant.bits=2", "quant.group_size=128"], {"bits": 2, "group_size": 128}
    ),
    "qwen2 tied 5 bits": ("qwen2", {"tied": True}, ["quant=mlx_int4", "quant.bits=5"], {"bits": 5}),
    "qwen3 6 bits": ("qwen3", {}, ["quant=mlx_int8", "quant.bits=6"], {"bits": 6}),
    "qwen3_moe int4": ("qwen3_moe", {}, ["quant=mlx_int4"], {}),
    "qwen3_moe int8 tied": ("qwen3_moe", {"tied": True}, ["quant=mlx_int8"], {"bits": 8}),
    "mixtral int4": ("mixtral", {}, ["quant=mlx_int4"], {}),
    "llama mxfp4": ("llama", {}, ["quant=mlx_mxfp4"], {"mode": "mxfp4"}),
    "llama tied mxfp4": ("llama", {"tied": True}, ["quant=mlx_mxfp4"], {"mode": "mxfp4"}),
    "llama odd sizes mxfp4": ("llama", {"inner": 200}, ["quant=mlx_mxfp4"], {"mode": "mxfp4"}),
    "qwen3_moe mxfp4": ("qwen3_moe", {}, ["quant=mlx_mxfp4"], {"mode": "mxfp4"}),
    "llama untied mxfp8": ("llama", {}, ["quant=mlx_mxfp8"], {"mode": "mxfp8"}),
    "llama tied mxfp8": ("llama", {"tied": True}, ["quant=mlx_mxfp8"], {"mode": "mxfp8"}),
    "llama odd sizes mxfp8": ("llama", {"inner": 200}, ["quant=mlx_mxfp8"], {"mode": "mxfp8"}),
    "qwen3_moe mxfp8 fp16": ("qwen3_moe", {"dtype": "F16"}, ["quant=mlx_mxfp8"], {"mode": "mxfp8"}),
    "mixtral nvfp4": ("mixtral", {}, ["quant=mlx_nvfp4"], {"mode": "nvfp4"}),
    "llama untied nvfp4": ("llama", {}, ["quant=mlx_nvfp4"], {"mode": "nvfp4"}),
    "llama tied nvfp4": ("llama", {"tied": True}, ["quant=mlx_nvfp4"], {"mode": "nvfp4"}),
    "llama odd sizes nvfp4": ("llama", {"inner": 200}, ["quant=mlx_nvfp4"], {"mode": "nvfp4"}),
    "llama tied mixed": ("llama", {"tied": True}, ["quant=mlx_mixed_4_6"], {"recipe": "mixed_4_6"}),
    "llama odd sizes mixed": ("llama", {"inner": 200}, ["quant=mlx_mixed_4_6"], {"recipe": "mixed_4_6"}),
    "llama mixed": ("llama", {}, ["quant=mlx_mixed_4_6"], {"recipe": "mixed_4_6"}),
    "qwen3_moe mixed": ("qwen3_moe", {}, ["quant=mlx_mixed_4_6"], {"recipe": "mixed_4_6"}),
    "mixtral mixed 2 6": (
        "mixtral", {}, ["quant=mlx_mixed_4_6", "quant.recipe=mixed_2_6"], {"recipe": "mixed_2_6", "bits": 2}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", some_quick(sorted(CASES), next(iter(CASES))))
def test_the_checkpoint_is_that_of_mlx_lm(case: str, tmp_path: Path, weightmill: Run) -> None:
    kind, made, arguments, settings = CASES[case]
    config = write_model(tmp_path / "source", kind, **made)
    model = theirs(tmp_path / "source", tmp_path / "peer", config, **settings)
    ran = weightmill(
        "run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", *arguments, "unit_mb=0.2"
    )
    assert ran.status == 0, ran.err
    check_same(tmp_path / "out", tmp_path / "peer", model)
    assert "transformers" not in ran.err
    ran = weightmill("verify", f"output.path={tmp_path / 'out'}")
    assert ran.status == 0, ran.out + ran.err


def test_the_demo_is_converted_as_mlx_lm_converts_it(tmp_path: Path, weightmill: Run) -> None:
    """By its own command, tokenizer and all; a config.json with torch_dtype has mlx-lm cast first."""
    shutil.copytree(DEMO, tmp_path / "source")
    config = json.loads((DEMO / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    mlx_convert.convert(str(tmp_path / "source"), tmp_path / "peer", quantize=True)
    ran = weightmill("run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", "quant=mlx_int4")
    assert ran.status == 0, ran.err
    model, _ = mlx_utils.load_model(tmp_path / "peer")
    check_same(tmp_path / "out", tmp_path / "peer", model)
    _, tokenizer = mlx_utils.load(str(tmp_path / "out"))
    assert tokenizer.decode(tokenizer.encode("the list")).endswith("the list")


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral"])
def test_without_quantization_mlx_lm_computes_what_the_source_says(kind: str, tmp_path: Path, weightmill: Run) -> None:
    """rope_theta and all: mlx-lm itself, given the settings by hand, computes the same from the source."""
    config = write_model(tmp_path / "source", kind, "F32", theta=5e5)
    run = (f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", "quant=none", "output=mlx")
    assert weightmill("run", *run).status == 0
    model, _ = mlx_utils.load_model(tmp_path / "source", model_config=config)
    ours, _ = mlx_utils.load_model(tmp_path / "out")
    assert np.array_equal(logits(ours), logits(model))


@pytest.mark.parametrize(
    ("kind", "arguments", "bits", "mode"),
    [
        ("llama", ["quant=mlx_int4", "quant.bits=3"], 3, "affine"),
        ("qwen3_moe", ["quant=mlx_int8"], 8, "affine"),
        ("mixtral", ["quant=mlx_mxfp4"], 4, "mxfp4"),
        ("qwen3_moe", ["quant=none", "output=mlx"], 0, "none"),
    ],
)
def test_an_mlx_checkpoint_is_read_back_under_transformers_names(
    kind: str, arguments: list[str], bits: int, mode: str, tmp_path: Path, weightmill: Run
) -> None:
    write_model(tmp_path / "source", kind, "F32")
    out, back = tmp_path / "out", tmp_path / "back"
    assert weightmill("run", f"model.path={tmp_path / 'source'}", f"output.path={out}", *arguments).status == 0
    ran = weightmill("run", f"model.path={out}", f"output.path={back}", "quant=none", "quant.dtype=float32")
    assert ran.status == 0, ran.err
    source, found, written = (read_safetensors(folder) for folder in (tmp_path / "source", back, out))
    assert set(found) == set(source)
    model = mlx.model_of({"model_type": kind})
    for name, raw in found.items():
        assert raw.dtype == "F32"
        stack, index = mlx.stack_of(model, name) or (name, None)
        module = stack.removesuffix(".weight")
        if f"{module}.scales" not in written:
            assert np.array_equal(raw.data, values_of(source[name])), name
            continue
        names = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
        parts = [written[each].data for each in names if each in written]
        arrays = [mx.array(part if index is None else part[index]) for part in parts]
        chosen = {"bits": 8, "mode": "affine"} if module.endswith("mlp.gate") else {"bits": bits, "mode": mode}
        group = 32 if chosen["mode"] == "mxfp4" else 64
        wanted = np.array(mx.dequantize(*arrays, group_size=group, dtype=mx.float32, **chosen))
        # a fused multiplication and addition may round once where we round twice
        assert np.allclose(raw.data, wanted, rtol=1e-6, atol=1e-8), name
    made = json.loads((back / "config.json").read_text())
    assert "quantization" not in made
    assert "quantization_config" not in made


def test_transformers_computes_the_same_from_a_checkpoint_that_was_mlx(tmp_path: Path, weightmill: Run) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write_model(tmp_path / "source", "qwen3_moe", "F32", theta=5e5)
    out, back = tmp_path / "out", tmp_path / "back"
    assert weightmill("run", f"model.path={tmp_path / 'source'}", f"output.path={out}", "quant=mlx_int8").status == 0
    ran = weightmill("run", f"model.path={out}", f"output.path={back}", "quant=none", "quant.dtype=float32")
    assert ran.status == 0, ran.err
    config = json.loads((back / "config.json").read_text())
    (back / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3MoeForCausalLM"]}))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (1, 9))
    with torch.no_grad():
        found = model(torch.from_numpy(ids)).logits.numpy()
    mine, _ = mlx_utils.load_model(out)
    wanted = logits(mine)
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()  # the same weights, float32 sums in other orders


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "an unknown model_type": ("llama", ["model_type=bloom"], "is not one whose MLX names are known here"),
    "another engine's scheme": ("llama", ["quant=nf4", "output=mlx"], "mlx holds MLX's schemes, not bitsandbytes's"),
    "half of the experts": (
        "mixtral", ["rules=[{name: experts.1., action: drop}]"], "mlx-lm stacks 4 experts, of which 3 are to be",
    ),
    "experts of different bits": (
        "mixtral", ["rules=[{name: experts.1., action: quantize, quant: {bits: 8}}]"], "give them different schemes",
    ),
    "a head_dim that cannot be told": ("mixtral", ["head_dim=64"], "head_dim is 64, but mlx-lm's mixtral takes"),
    "rows that do not divide": (
        "llama", ["quant.group_size=128", "rules=[{name: down_proj, action: quantize}]"],
        "their rows of 192 do not divide into groups of 128",
    ),
    "bits that a mode lacks": ("llama", ["quant=mlx_mxfp4", "quant.bits=8"], "bits is 8; mxfp4 has 4"),
    "an unknown setting of a rule": (
        "llama", ["rules=[{name: down_proj, action: quantize, quant: {bits: 7}}]"], "bits is 7; affine has 2, 3, 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_mlx_lm_could_not_load_is_refused_in_the_plan(case: str, tmp_path: Path, weightmill: Run) -> None:
    kind, arguments, message = REFUSED[case]
    write_model(tmp_path / "source", kind)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    changes = dict(a.split("=") for a in arguments if a.startswith(("model_type", "head_dim")))
    changed = {key: int(value) if value.isdigit() else value for key, value in changes.items()}
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, **changed}))
    rest = [a for a in arguments if not a.startswith(("model_type", "head_dim"))]
    quant = [] if any(a.startswith("quant=") for a in rest) else ["quant=mlx_int4"]
    ran = weightmill("plan", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", *quant, *rest)
    assert ran.status == 2, ran.out
    assert re.search(message, " ".join(ran.err.split())), ran.err


def test_a_rule_gives_some_modules_other_bits_or_modes(tmp_path: Path, weightmill: Run) -> None:
    write_model(tmp_path / "source", "llama")
    ran = weightmill(
        "run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", "quant=mlx_int4",
        "rules=[{name: v_proj, action: quantize, quant: {bits: 8, group_size: 32}},{role: embedding, action: keep},"
        "{role: head, action: quantize, quant: {mode: mxfp8, bits: 8, group_size: 32}}]",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert block == {
        "group_size": 64, "bits": 4, "mode": "affine",
        "lm_head": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "model.layers.0.self_attn.v_proj": {"group_size": 32, "bits": 8},
        "model.layers.1.self_attn.v_proj": {"group_size": 32, "bits": 8},
    }  # fmt: skip
    model, _ = mlx_utils.load_model(tmp_path / "out")
    assert (model.lm_head.mode, model.lm_head.bits) == ("mxfp8", 8)
    assert model.layers[1].self_attn.v_proj.group_size == 32
    assert not hasattr(model.model.embed_tokens, "scales")
    assert np.isfinite(logits(model)).all()


def test_one_flipped_bit_of_a_stack_is_found(tmp_path: Path, weightmill: Run) -> None:
    write_model(tmp_path / "source", "qwen3_moe")
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={tmp_path / 'source'}", f"output.path={out}", "quant=mlx_int4").status == 0
    assert weightmill("verify", f"output.path={out}").status == 0
    [path] = out.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = header["model.layers.1.mlp.switch_mlp.up_proj.weight"]["data_offsets"][0]
    data[8 + int.from_bytes(data[:8], "little") + start + 100] ^= 1
    path.write_bytes(data)
    ran = weightmill("verify", f"output.path={out}")
    assert ran.status == 1
    assert "switch_mlp.up_proj.weight" in ran.out + ran.err


def test_a_part_that_is_missing_is_told(tmp_path: Path, weightmill: Run) -> None:
    write_model(tmp_path / "source", "llama")
    out = tmp_path / "out"
    assert weightmill("run", f"model.path={tmp_path / 'source'}", f"output.path={out}", "quant=mlx_int4").status == 0
    tensors = read_safetensors(out)
    del tensors["lm_head.biases"]
    write_safetensors(out / "model.safetensors", tensors)
    (out / "model.safetensors.index.json").unlink()
    ran = weightmill("plan", f"model.path={out}", f"output.path={tmp_path / 'x'}", "quant=nf4")
    assert ran.status == 1
    assert "lm_head.weight: it is quantized, but lm_head.biases is missing" in ran.err
