"""Layers for multi-token prediction: each engine's own default, what mtp asks instead, and that the plan says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loaders.containers import gguf
from tests.making import Raw, llama_tensors, make_source
from tests.reading import files_of

pytestmark = pytest.mark.quick

LAYER = "model.layers.2."


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return made(tmp_path / "source", "llama")


def made(folder: Path, model_type: str) -> Path:
    """Write a model of two layers, and one after them for multi-token prediction."""
    tensors = llama_tensors(layers=3)
    joined = tensors["model.layers.0.mlp.down_proj.weight"]  # [hidden, 2 * hidden]
    norm = tensors["model.norm.weight"]
    tensors |= {f"{LAYER}eh_proj.weight": joined, f"{LAYER}enorm.weight": norm, f"{LAYER}hnorm.weight": norm}
    tensors[f"{LAYER}shared_head.norm.weight"] = Raw("BF16", norm.data)
    return make_source(folder, tensors, model_type=model_type, num_nextn_predict_layers=1, head_dim=16)


def rows_of(weightmill: Callable[..., Any], source: Path, *settings: str) -> list[dict[str, Any]]:
    ran = weightmill("plan", f"model.path={source}", "format=json", "tensors=all", *settings)
    assert ran.status == 0, ran.err
    found: list[dict[str, Any]] = json.loads(ran.out)["rules"]
    return found


CASES = [
    ("quant=nf4", "auto", "keep", "transformers loads no layers for multi-token prediction"),
    ("quant=nf4", "drop", "drop", "mtp=drop"),
    (
        "quant=w8a16 quant.group_size=64",
        "auto",
        "keep",
        "llm-compressor keeps layers for multi-token prediction as they are",
    ),
    ("quant=w8a16 quant.group_size=64", "quantize", "quantize", "mtp=quantize"),
    ("quant=w8a16 quant.group_size=64", "drop", "drop", "mtp=drop"),
    ("quant=mlx_int4 quant.group_size=64", "auto", "drop", "mlx-lm has no layers for multi-token prediction"),
    ("quant=gguf_q8_0", "auto", "drop", "llama.cpp's converter writes no layers for multi-token prediction for llama"),
]


@pytest.mark.parametrize(("quant", "choice", "action", "why"), CASES)
def test_the_plan_names_what_becomes_of_them(
    quant: str, choice: str, action: str, why: str, source: Path, weightmill: Callable[..., Any]
) -> None:
    [row] = [row for row in rows_of(weightmill, source, *quant.split(), f"mtp={choice}") if row["why"] == why]
    assert row["action"] == action
    # of the layer's thirteen tensors, those of linear layers alone are quantized
    assert row["tensors"] == (8 if action == "quantize" else 13)


REFUSED = [
    ("quant=nf4", "quantize", "transformers loads no layers for multi-token prediction; choose keep or drop"),
    (
        "quant=mlx_int4 quant.group_size=64",
        "keep",
        "mlx-lm has no layers for multi-token prediction; drop leaves them out",
    ),
    ("quant=gguf_q8_0", "quantize", "llama.cpp's converter writes no layers .* for llama; drop leaves them out"),
]


@pytest.mark.parametrize(("quant", "choice", "why"), REFUSED)
def test_what_an_engine_cannot_do_with_them_is_refused(
    quant: str, choice: str, why: str, source: Path, weightmill: Callable[..., Any]
) -> None:
    ran = weightmill("plan", f"model.path={source}", *quant.split(), f"mtp={choice}")
    assert ran.status != 0
    assert_found(why, ran.err)


def assert_found(pattern: str, text: str) -> None:
    flat = " ".join(text.split())
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(flat)


def test_without_such_layers_only_auto_goes(tmp_path: Path, weightmill: Callable[..., Any]) -> None:
    plain = make_source(tmp_path / "plain")
    ran = weightmill("plan", f"model.path={plain}", "quant=nf4", "mtp=keep")
    assert ran.status != 0
    assert_found("mtp: keep was asked, and the checkpoint has no layers for multi-token prediction", ran.err)


@pytest.mark.parametrize(
    ("choice", "layers", "dtype"),
    [("auto", 3, "Q8_0"), ("quantize", 3, "Q8_0"), ("keep", 3, "BF16"), ("drop", 2, None)],
)
def test_a_gguf_counts_the_layers_that_it_holds(
    choice: str, layers: int, dtype: str | None, tmp_path: Path, weightmill: Callable[..., Any]
) -> None:
    source, out = made(tmp_path / "source", "glm4_moe"), tmp_path / "out"
    ran = weightmill(
        "run", f"model.path={source}", f"output.path={out}", "quant=gguf_q8_0", f"mtp={choice}", "lint=warn"
    )
    assert ran.status == 0, ran.err
    [file] = out.glob("*.gguf")
    metadata = gguf.plain(gguf.read_metadata(files_of(out), file.name))
    types = {spec.name: spec.dtype.name for spec in gguf.read_specs(files_of(out), file.name)}
    assert metadata["glm4moe.block_count"] == layers
    assert metadata.get("glm4moe.nextn_predict_layers") == (1 if dtype else None)
    assert types.get("blk.2.nextn.eh_proj.weight") == dtype
    assert types.get("blk.2.ffn_up.weight") == dtype
