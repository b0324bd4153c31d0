"""jobs.inspect: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.making import llama_tensors, write_checkpoint


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
