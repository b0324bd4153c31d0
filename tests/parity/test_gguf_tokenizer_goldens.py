"""tokenizer.* and general.* of tiny checkpoints, held against the goldens of llama.cpp's own converter.

Whether the model's architecture is known here does not matter: the keys are made from the tokenizer's files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loaders.containers import gguf
from loaders.containers.gguf import MetadataValue
from loaders.layouts.gguf.model_names import size_label, title
from loaders.layouts.gguf.tokenizers.tokenizer import tokenizer_metadata
from tests import tiny_models, tiny_tokenizers
from tests.gguf_goldens import golden_path, summary
from tests.reading import files_of
from tests.tiny_configs import ROWS, TINY

pytest.importorskip("transformers")
pytestmark = pytest.mark.engine

KINDS = [kind for kind in TINY if golden_path(kind).exists()]
# The converter is given a name (tests/converter.py), while ours finds that of the tiny tokenizer.
GIVEN = {"hunyuan_v1_alpha", "bert"}
# Where ours differs from the converter, and why that is right.
DIFFERENT = {
    "gemma": {"eot_token_id": "the converter writes 107 whatever it is; ours only <end_of_turn>"},
    "hunyuan_v1_alpha": {"eot_token_id": "as hunyuan_v1_dense"},
    "hunyuan_v1_dense": {"eot_token_id": "generation_config.json has one more token that ends a text"},
}  # fmt: skip


def golden_of(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(golden_path(kind).read_text(encoding="utf-8"))
    return found


def told(metadata: dict[str, MetadataValue], folder: Path) -> dict[str, Any]:
    """Return metadata as a golden tells them."""
    path = folder / "metadata.gguf"
    path.write_bytes(gguf.header(metadata, []))
    found: dict[str, Any] = summary(path)["metadata"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_told_as_the_converter_tells_it(kind: str, tmp_path: Path) -> None:
    config, _ = tiny_models.model_of(kind)
    tiny_tokenizers.write(TINY[kind].tokenizer, tmp_path)
    ids = tiny_tokenizers.IDS[TINY[kind].tokenizer]
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["pad"]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = told(tokenizer_metadata(files_of(tmp_path), config, ROWS)[0], tmp_path)
    wanted = {key: value for key, value in golden_of(kind)["metadata"].items() if key.startswith("tokenizer.")}
    differs = {key for key in {*found, *wanted} if found.get(key) != wanted.get(key)}
    expected = {f"tokenizer.ggml.{key}" for key in (*DIFFERENT.get(kind, {}), *(["pre"] if kind in GIVEN else []))}
    assert differs == expected, {key: (wanted.get(key), found.get(key)) for key in differs ^ expected}


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_name_are_those_of_the_converter(kind: str) -> None:
    golden = golden_of(kind)
    label, _ = size_label([(name, shape) for name, (_, shape, _) in golden["tensors"].items()])
    assert ["STRING", label] == golden["metadata"]["general.size_label"]
    assert ["STRING", title(kind)] == golden["metadata"]["general.name"]
