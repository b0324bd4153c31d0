"""general.* from a model's card and names, held against gguf-py's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loaders.containers import gguf
from loaders.layouts.gguf.model_card import card_of, model_card_metadata
from loaders.layouts.gguf.model_names import name_parts, rounded, size_label, title
from tests.reading import files_of

CARD = """---
license: [apache-2.0, mit]
license_name: own
license_link: https://example.org/LICENSE
language:
- en
- no
tags:
- chat
pipeline_tag: text-generation
base_model:
- Qwen/Qwen2.5-0.5B
- https://huggingface.co/meta-llama/Llama-3.1-8B
- {name: Other, author: someone}
datasets: [org/data-v2]
model_creator: Someone
version: 1.5
---
# The model
"""
PARTS = ("name", "organization", "basename", "finetune", "version", "size_label")
NAMES = (
    "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct", "mistralai/Mixtral-8x7B-Instruct-v0.1", "bigscience/bloom-7b1",
    "gpt2-xl", "Llama-3-8B-Instruct-262k", "Phi-3-mini-4k-instruct", "./x/y", "a/b/c", "model", "--", "a model",
    "Mistral-7B-v0.1-bf16", "DeepSeek-V3",
)  # fmt: skip


def made(folder: Path, name: str, tensors: Any = ()) -> dict[str, Any]:
    files = files_of(folder)
    config = json.loads((folder / "config.json").read_text())
    return gguf.plain(model_card_metadata(card_of(files), config, name, tensors))


def test_a_card_is_told_as_gguf_py_tells_it(tmp_path: Path) -> None:
    metadata = pytest.importorskip("gguf.metadata").Metadata
    folder = tmp_path / "My-Model-7B-Instruct"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"_name_or_path": "Org/Base-7B"}')
    theirs = metadata.load(model_path=folder, total_params=7_000_000_000)
    found = made(folder, folder.name, [("a.weight", (7_000_000, 1000))])
    for key in ("name", "author", "organization", "finetune", "basename", "size_label"):
        assert found[f"general.{key}"] == getattr(theirs, key), key
    assert found["general.version"] == "1.5"
    assert found["general.license"] == ",".join(theirs.license)
    assert (found["general.license.name"], found["general.license.link"]) == (theirs.license_name, theirs.license_link)
    assert list(found["general.tags"]) == theirs.tags
    assert list(found["general.languages"]) == theirs.languages == ["en", "no"]
    for key, rows in (("base_model", theirs.base_models), ("dataset", theirs.datasets)):
        assert found[f"general.{key}.count"] == len(rows)
        for number, row in enumerate(rows):
            for field, value in row.items():
                assert found[f"general.{key}.{number}.{field}"] == value


@pytest.mark.parametrize("parameters", [0, 137_000, 8_000_000_000])
@pytest.mark.parametrize("name", NAMES)
def test_names_have_the_parts_that_gguf_py_finds(name: str, parameters: int) -> None:
    metadata = pytest.importorskip("gguf.metadata").Metadata
    found = name_parts(name, parameters)
    assert tuple(getattr(found, part) for part in PARTS) == metadata.get_model_id_components(name, parameters)
    assert title(name) == metadata.id_to_title(name)


def test_a_size_counts_one_expert_of_a_stack() -> None:
    stack = ("blk.0.ffn_up_exps.weight", (8, 10, 100))
    assert size_label([("a", (10, 100)), stack, ("blk.0.ffn_up_exps.bias", (8, 10))]) == ("8x2.1K", 9080)
    assert size_label([]) == (None, 0)
    assert (rounded(7_241_732_096), rounded(671e9), rounded(164_000)) == ("7.2B", "671B", "164K")


@pytest.mark.parametrize(
    "card", ["---\n[\n---\n", "---\n- list\n---\n", "no front matter", "", "---\na: &x [*x]\n---\n"]
)
def test_a_card_that_says_nothing_is_passed_over(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text("{}")
    assert made(tmp_path, "tiny") == {"general.name": "Tiny"}
