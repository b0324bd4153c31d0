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
        ("W4A8_AWQ", {}, r"quant_algo 'W4A8_AWQ' in groups of 16 is not decoded; NVFP4 in groups of 16, and FP8, are"),
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
