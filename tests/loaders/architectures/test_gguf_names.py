"""llama.cpp's names of tensors, held against gguf-py: the installed one, and that of the pinned llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from loaders.architectures.gguf_names import NAMES_FILE, gguf_name, tensor_names
from loaders.places import ROOT
from tests.converter import cache_folder
from tests.gguf_names import names

gguf = pytest.importorskip("gguf")


def modules_of(table: dict[str, Any], architecture: str) -> dict[str, str]:
    """Return GGUF's names by those of checkpoints' modules, as an architecture has them."""
    own, found = table["own"].get(architecture, {}), {}
    for kind in table["architectures"][architecture]:
        for module in own.get(kind, table["modules"].get(kind, ())):
            found[module] = table["tensors"][kind]
    return found


def test_the_installed_gguf_says_nothing_else() -> None:
    """It may be older and lack entries; where both have one, they are the same."""
    table, installed = json.loads(NAMES_FILE.read_text()), names(gguf)
    wrong = {}
    for architecture in installed["architectures"].keys() & table["architectures"].keys():
        ours, theirs = modules_of(table, architecture), modules_of(installed, architecture)
        wrong[architecture] = {m: (ours[m], theirs[m]) for m in ours.keys() & theirs.keys() if ours[m] != theirs[m]}
    assert {architecture: found for architecture, found in wrong.items() if found} == {}
    assert len(wrong) > 100
    lost = {
        architecture: missing
        for architecture in wrong
        if (missing := modules_of(installed, architecture).keys() - modules_of(table, architecture).keys())
    }
    assert lost == {}, "the installed gguf knows more: write the table anew, python -m tests.gguf_names FOLDER"


def test_the_pinned_gguf_says_exactly_this() -> None:
    folder = cache_folder() / "gguf-py"
    if not folder.exists():
        pytest.skip("python -m tests.converter has not unpacked the pinned llama.cpp here")
    command = [sys.executable, "-m", "tests.gguf_names", str(folder), "--print"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == NAMES_FILE.read_text()


def test_names_of_tensors() -> None:
    assert gguf_name("llama", "model.layers.12.self_attn.q_proj.weight") == "blk.12.attn_q.weight"
    assert gguf_name("llama", "model.layers.12.self_attn.r_proj.weight") is None
    assert gguf_name("qwen35", "model.layers.3.linear_attn.A_log") == "blk.3.ssm_a"
    # A stack that nobody cut has no place: only what is known to be whole does.
    assert gguf_name("qwen35moe", "model.layers.3.mlp.experts.down_proj") is None
    assert gguf_name("qwen35moe", "model.layers.3.mlp.experts.down_proj.weight") == "blk.3.ffn_down_exps.weight"
    assert "blk.{}.attn_q" in tensor_names("llama")
    assert tensor_names("nonesuch") == ()
