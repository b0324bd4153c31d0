"""jobs.inspect: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.places import ROOT
from tests.making import Raw, llama_tensors, make_source, write_checkpoint


@pytest.mark.quick
def test_inspect_says_what_is_there(source: Path, weightmill: Any) -> None:
    document = weightmill("inspect", f"model.path={source}", "format=json").document
    assert document["family"] == "llama"
    assert document["parameters"] == sum(raw.data.size for raw in llama_tensors().values())
    assert {row["name"] for row in document["tensors"]} == set(llama_tensors())
    said = weightmill("inspect", f"model.path={source}").out
    assert "embedding" in said
    assert "3 files, 21 tensors" in said
    assert "model.layers.1.mlp.up_proj.weight" in weightmill("inspect", f"model.path={source}", "tensors=all").out


def test_inspect_knows_what_is_quantized(source: Path, tmp_path: Path, weightmill: Any) -> None:
    for quant, kind in (("nf4", "bnb4"), ("ternary", "ternary")):
        assert (
            weightmill("run", f"model.path={source}", f"output.path={tmp_path / quant}", f"quant={quant}").status == 0
        )
        document = weightmill("inspect", f"model.path={tmp_path / quant}", "format=json").document
        assert document["parameters"] == sum(raw.data.size for raw in llama_tensors().values())
        assert sum(row["stored_as"] == kind for row in document["tensors"]) == 14


def test_inspect_says_what_is_tied(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors(tied=True)
    root = write_checkpoint(tmp_path / "m", tensors)
    from tests.making import write_safetensors

    write_safetensors(root / "model.safetensors", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    document = weightmill("inspect", f"model.path={root}", "format=json").document
    assert document["tied"] == [{"kept": "model.embed_tokens.weight", "tied": "lm_head.weight"}]


@pytest.mark.quick
def test_a_stale_description_is_said_in_the_same_words_by_every_verb(tmp_path: Path, weightmill: Any) -> None:
    block = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    root = make_source(tmp_path / "m", quantization_config=block)
    said = f"{root}/config.json's quantization_config says that the weights are quantized (bitsandbytes), but all are"
    document = weightmill("inspect", root, "format=json").document
    assert document["quantization"] is None
    assert said in document["notes"][0]
    assert said in weightmill("plan", f"model.path={root}").err
    findings = weightmill("lint", root, "format=json").document["findings"]
    assert [said in finding["what"] for finding in findings if finding["level"] == "fault"] == [True]


def test_inspect_names_the_types_of_a_gguf(tmp_path: Path, weightmill: Any) -> None:
    out = tmp_path / "out"
    assert weightmill("run", f"output.path={out}", "quant=gguf_q8_0").status == 0
    document = weightmill("inspect", out, "format=json").document
    kinds = {row["name"]: row["stored_as"] for row in document["tensors"]}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "Q8_0"
    assert kinds["model.norm.weight"] == "F32"
    said = weightmill("inspect", out).out
    assert "Q8_0" in said
    assert "ggml" not in said


@pytest.mark.quick
def test_a_model_has_one_count_of_parameters_wherever_it_is_said(tmp_path: Path, weightmill: Any) -> None:
    tensors = llama_tensors()
    count = sum(raw.data.size for raw in tensors.values())
    positions = Raw("I64", np.arange(512, dtype=np.int64))
    root = write_checkpoint(tmp_path / "m", {**tensors, "model.position_ids": positions})
    assert weightmill("inspect", root, "format=json").document["parameters"] == count
    made = weightmill("run", f"model.path={root}", f"output.path={tmp_path / 'out'}", "quant=nf4", "format=json")
    assert made.document["totals"]["parameters"] == count
    assert weightmill("inspect", tmp_path / "out", "format=json").document["parameters"] == count
    gguf = tmp_path / "gguf"
    demo = weightmill("run", f"output.path={gguf}", "quant=gguf_q8_0", "format=json").document["totals"]["parameters"]
    for quant in ("gguf_q4_0", "nf4"):  # again from its codes, and from what they decode to
        planned = weightmill("plan", f"model.path={gguf}", f"quant={quant}", "format=json").document
        assert planned["source"]["parameters"] == demo


@pytest.mark.quick
def test_all_columns_are_shown_where_they_are_asked_for(weightmill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    demo = ("inspect", ROOT / "jobs" / "demo", "tensors=all")
    few, every = weightmill(*demo).out, weightmill(*demo, "columns=all").out
    assert "a wider terminal, or columns=all" in " ".join(few.split())
    assert "model-00002-of-00003.safetensors" not in few
    assert "columns=all" not in every
    assert every.count("layers.2.self_attn.v_proj") > 1
