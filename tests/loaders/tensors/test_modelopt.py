"""ModelOpt's NVFP4 and FP8 as sources, held against a decoder written out here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import ThreadedWork
from loaders.errors import BadCheckpoint
from tests.loaders.tensors.quantized import Q_PROJ, bf16, e4m3_values_once, fp8_tensors, write
from tests.making import LLAMA, Raw, llama_tensors, read_safetensors, values_of, write_checkpoint
from tests.reading import tensors_in, values

MODULE = Q_PROJ.removesuffix(".weight")


# --- NVFP4 of ModelOpt

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nvfp4_parts(name: str) -> tuple[dict[str, Raw], np.ndarray]:
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (64, 40), dtype=np.uint8)
    scale, top = rng.integers(1, 127, (64, 5), dtype=np.uint8), np.array(0.003, np.float32)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(64, 80)
    wanted = E2M1[codes] * np.repeat(e4m3_values_once[scale] * top, 16, axis=1)
    parts = {
        name: Raw("U8", packed),
        name + "_scale": Raw("F8_E4M3", scale),
        name + "_scale_2": Raw("F32", top),
        name.replace("weight", "input_scale"): Raw("F32", np.array(1, np.float32)),
    }
    return parts, wanted


def modelopt_checkpoint(root: Path, tensors: Mapping[str, Raw], place: str, algorithm: str = "NVFP4") -> Path:
    settings = {"quant_algo": algorithm, "group_size": 16, "exclude_modules": ["lm_head"]}
    if place == "config.json":
        return write(root, tensors, {"quant_method": "modelopt", **settings})
    write_checkpoint(root, dict(tensors), config={**LLAMA, "dtype": "float32"})
    document = {"producer": {"name": "modelopt"}, "quantization": settings}
    (root / "hf_quant_config.json").write_text(json.dumps(document))
    return root


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("step", [None, 7, 500])
@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_nvfp4_is_code_times_both_scales(place: str, step: int | None, tmp_path: Path, work: ThreadedWork) -> None:
    parts, wanted = nvfp4_parts(Q_PROJ)
    root = modelopt_checkpoint(tmp_path, {**llama_tensors("F32"), **parts}, place)
    found = tensors_in(root)
    assert np.array_equal(values(root, found[Q_PROJ], work, step), wanted)
    assert not any("scale" in name for name in found)


def test_modelopts_fp8_has_one_scale(tmp_path: Path, work: ThreadedWork) -> None:
    codes, _ = fp8_tensors((64, 64), (64, 64))
    tensors = {**llama_tensors("F32"), Q_PROJ: Raw("F8_E4M3", codes)}
    tensors[Q_PROJ + "_scale"] = Raw("F32", np.array(0.25, np.float32))
    root = modelopt_checkpoint(tmp_path, tensors, "config.json", "FP8")
    assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work), e4m3_values_once[codes] * np.float32(0.25))


def forms() -> dict[str, tuple[dict[str, Raw], np.ndarray]]:
    """Parts of a weight (256, 96) as each algorithm stores them, and its values."""
    rng = np.random.default_rng(0)
    codes, _ = fp8_tensors((256, 96), (256, 96))
    floats, packed = e4m3_values_once[codes], rng.integers(0, 256, (256, 48), dtype=np.uint8)
    powers = rng.integers(100, 130, (256, 3), dtype=np.uint8)
    factors = np.repeat(np.exp2(powers - 127.0), 32, axis=1).astype(np.float32)
    rows, blocks = rng.random(256).astype(np.float32), rng.random((2, 1)).astype(np.float32)
    halves = E2M1[np.stack([packed & 15, packed >> 4], axis=-1).reshape(256, 96)]
    wide = floats * np.repeat(blocks, 128, axis=0)
    found = {
        "FP8_PER_CHANNEL_PER_TOKEN": (rows, floats * rows[:, None]),
        "FP8": (rows[:, None], floats * rows[:, None]),
        "fp8_pb_wo": (blocks[:, None, :, None], wide),
        "FP8_PB_REAL": (blocks, wide),
        "MXFP8": (powers, floats * factors),
        "W4A8_MXFP4_FP8": (powers, halves * factors),
    }
    return {
        said: (
            {
                Q_PROJ: Raw("U8", packed) if "FP4" in said else Raw("F8_E4M3", codes),
                Q_PROJ + "_scale": Raw("U8" if scale.dtype == np.uint8 else "F32", scale),
            },
            wanted,
        )
        for said, (scale, wanted) in found.items()
    }


@pytest.mark.parametrize("said", forms())
def test_each_algorithm_is_code_times_scale(said: str, tmp_path: Path, work: ThreadedWork) -> None:
    parts, wanted = forms()[said]
    cache = {f"{MODULE}.k_scale": Raw("F32", np.ones(1, np.float32))}
    settings = {"quant_method": "modelopt", "quant_algo": said, "kv_cache_quant_algo": "FP8"}
    root = write(tmp_path, {**llama_tensors("F32"), **parts, **cache}, settings)
    for step in (None, 97):
        assert np.array_equal(values(root, tensors_in(root)[Q_PROJ], work, step), wanted)
    assert not any("scale" in name for name in tensors_in(root))


@pytest.mark.parametrize("method", ["modelopt", "modelopt_mixed"])
def test_modules_may_have_algorithms_of_their_own(method: str, tmp_path: Path, work: ThreadedWork) -> None:
    """The same in config.json and in hf_quant_config.json, which names the tool alone."""
    four, fours = nvfp4_parts(Q_PROJ)
    eight, eights = forms()["FP8_PER_CHANNEL_PER_TOKEN"]
    other = Q_PROJ.replace("self_attn.q_proj", "mlp.up_proj")
    eight = {name.replace(Q_PROJ, other): raw for name, raw in eight.items()}
    layers = {
        MODULE: {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        other.removesuffix(".weight"): {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    }
    settings = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    root = write(tmp_path, {**llama_tensors("F32"), **four, **eight}, {"quant_method": method, **settings})
    (root / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    found = tensors_in(root)
    assert np.array_equal(values(root, found[Q_PROJ], work), fours)
    assert np.array_equal(values(root, found[other], work), eights)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({MODULE: {"quant_algo": "FP8"}}, r"q_proj.weight: its quant_algo is FP8, but what is stored is NVFP4"),
        ({MODULE: {"quant_algo": "W4A16_AWQ"}}, r"q_proj: ModelOpt's quant_algo 'W4A16_AWQ' in groups of None is not"),
        ({MODULE: {"quant_algo": "MIXED_PRECISION"}}, r"q_proj: ModelOpt's quant_algo 'MIXED_PRECISION' in groups"),
        ({"a.b": {"quant_algo": "FP8"}}, r"quantized_layers names a.b, of which no quantized weight is stored"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(layers: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts, _ = nvfp4_parts(Q_PROJ)
    settings = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    root = write(tmp_path, {**llama_tensors("F32"), **parts}, settings)
    with pytest.raises(BadCheckpoint, match=message):
        tensors_in(root)


def test_nvfp4_comes_back_plain_without_its_settings(tmp_path: Path, weightmill: Any) -> None:
    parts, wanted = nvfp4_parts(Q_PROJ)
    root = modelopt_checkpoint(tmp_path / "nvfp4", {**llama_tensors("F32"), **parts}, "hf_quant_config.json")
    ran = weightmill(
        "run",
        f"model.path={root}",
        f"output.path={tmp_path / 'out'}",
        "quant=none",
        "quant.dtype=bfloat16",
        "lint=warn",
    )
    assert ran.status == 0, ran.err
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert np.array_equal(values_of(read_safetensors(tmp_path / "out")[Q_PROJ]), bf16(wanted))
    copied = weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'copy'}", "quant=none", "lint=warn")
    assert copied.status == 0, copied.err
    assert (tmp_path / "copy" / "hf_quant_config.json").exists()


@pytest.mark.parametrize(
    ("algorithm", "change", "message"),
    [
        ("W4A8_AWQ", {}, r"quant_algo 'W4A8_AWQ' in groups of 16 is not decoded; NVFP4 in groups of 16, MXFP4 in"),
        ("MXFP8", {}, r"quant_algo 'MXFP8' in groups of 16 is not decoded"),
        ("NVFP4", {"weight_scale": None}, r"q_proj.weight: it is quantized, but .*q_proj.weight_scale is missing"),
        ("NVFP4", {"weight_scale_2": None}, r"q_proj.weight_scale_2 is missing"),
        ("NVFP4", {"weight": None}, r"q_proj.weight is missing"),
        (
            "NVFP4",
            {"weight_scale": Raw("F8_E4M3", np.ones((64, 4), np.uint8))},
            r"weight_scale: expected F8_E4M3 \[64, 5\] .* found F8_E4M3 \[64, 4\]",
        ),
        ("NVFP4", {"weight_scale_2": Raw("F32", np.ones(2, np.float32))}, r"weight_scale_2: expected F32 \[\]"),
        ("NVFP4", {"pre_quant_scale": Raw("F32", np.ones(2, np.float32))}, r"pre_quant_scale: weights smoothed for"),
    ],
)
def test_nvfp4_that_is_not_whole_is_refused(
    algorithm: str, change: dict[str, Raw | None], message: str, tmp_path: Path
) -> None:
    parts, _ = nvfp4_parts(Q_PROJ)
    tensors = {**llama_tensors("F32"), **parts, **{f"{MODULE}.{n}": raw for n, raw in change.items()}}
    whole = {n: raw for n, raw in tensors.items() if raw is not None}
    root = modelopt_checkpoint(tmp_path, whole, "config.json", algorithm)
    with pytest.raises(BadCheckpoint, match=message):
        tensors_in(root)
