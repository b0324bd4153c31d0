"""Our GGUF of every tiny model, held against the goldens of llama.cpp's own converter (python -m tests.converter).

Tensors have the same type, shape and bytes, and metadata the same values, but for what DELIBERATE lists. A type that we
do not write yet is refused in words that say so. When transformers changes what a class stores or says, the golden of
its type differs here; then run the converter again and read what changed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from loaders.architectures.gguf import architecture_of
from loaders.errors import BadSpec
from tests import passes, tiny_models
from tests.gguf_goldens import GOLDENS, differences, golden_path, summary
from tests.tiny_configs import TINY

pytestmark = pytest.mark.engine

KINDS = sorted(path.stem for path in GOLDENS.glob("*.json") if path.stem != "index")
FIRST = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"}
# Lines of `differences` that are meant: a pattern, and why.
DELIBERATE = {
    r"metadata general\.(name|size_label): ": "the converter guesses them from the folder's name and a model card",
    r"metadata \w+\.attention\.(key|value)_length: expected \"absent\"": "llama.cpp would take hidden size / heads",
    r"metadata qwen\w+\.(rope\.dimension_count|vocab_size): expected \"absent\"": "written for all of them alike",
    r"metadata llama\.attention\.sliding_window: expected \"absent\"": "kept for whoever reads it; see not_computed",
}


def is_written(config: dict[str, Any]) -> bool:
    """Whether a model type goes to GGUF."""
    try:
        architecture_of(config)
    except BadSpec:
        return False
    return True


@pytest.fixture(scope="module")
def written() -> list[str]:
    return [kind for kind in KINDS if is_written({"model_type": TINY[kind].model_type})]


def test_every_type_has_a_golden_or_a_reason(written: list[str]) -> None:
    index = json.loads((GOLDENS / "index.json").read_text())
    assert {*KINDS, *index["failed"]} == set(TINY)
    assert set(written) >= FIRST


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_converter_writes(kind: str, tmp_path: Path) -> None:
    source = tiny_models.make(kind, tmp_path / kind)
    config = json.loads((source / "config.json").read_text())
    if not is_written(config):
        with pytest.raises(BadSpec, match=re.escape(repr(config["model_type"]))):
            passes.plan(source, "gguf_bf16")
        return
    made = passes.run(source, tmp_path / "out", "gguf_bf16")["gguf_bf16"]
    [file] = made.folder.glob("*.gguf")
    found = differences(json.loads(golden_path(kind).read_text()), summary(file))
    assert not [line for line in found if not any(re.match(pattern, line) for pattern in DELIBERATE)]
