"""Held against mlx-lm itself: the same bytes from its quantizer, the same checkpoint, the same logits."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.quantization.mlx import BITS, GROUP_SIZES, MlxAffine
from loaders.quantization.mlx_float import MlxFloat
from loaders.quantization.scheme import Scheme
from loaders.work import ThreadedWork
from tests import reference
from tests.loaders.test_schemes import MemorySink, MemoryView
from tests.making import Raw, read_safetensors, weights, write_checkpoint

mx = pytest.importorskip("mlx.core")
mlx_utils = pytest.importorskip("mlx_lm.utils")
mlx_convert = pytest.importorskip("mlx_lm.convert")
pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parent.parent.parent
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
    with ThreadPoolExecutor(1) as pool:
        scheme.encode(view, sink, ThreadedWork(kernels_of("cpu"), pool, threading.Event()))
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
    "qwen3_moe mxfp8 fp16": ("qwen3_moe", {"dtype": "F16"}, ["quant=mlx_mxfp8"], {"mode": "mxfp8"}),
    "mixtral nvfp4": ("mixtral", {}, ["quant=mlx_nvfp4"], {"mode": "nvfp4"}),
    "llama mixed": ("llama", {}, ["quant=mlx_mixed_4_6"], {"recipe": "mixed_4_6"}),
    "qwen3_moe mixed": ("qwen3_moe", {}, ["quant=mlx_mixed_4_6"], {"recipe": "mixed_4_6"}),
    "mixtral mixed 2 6": (
        "mixtral", {}, ["quant=mlx_mixed_4_6", "quant.recipe=mixed_2_6"], {"recipe": "mixed_2_6", "bits": 2}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_checkpoint_is_that_of_mlx_lm(case: str, tmp_path: Path, weightmill: Run) -> None:
    kind, made, arguments, settings = CASES[case]
    config = write_model(tmp_path / "source", kind, **made)
    model = theirs(tmp_path / "source", tmp_path / "peer", config, **settings)
    ran = weightmill(
        "run", f"model.path={tmp_path / 'source'}", f"output.path={tmp_path / 'out'}", *arguments, "source.unit_mb=0.2"
    )
    assert ran.status == 0, ran.err
    check_same(tmp_path / "out", tmp_path / "peer", model)
    ran = weightmill("verify", f"output.path={tmp_path / 'out'}")
    assert ran.status == 0, ran.out + ran.err
