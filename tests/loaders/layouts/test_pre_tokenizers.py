"""Names of pre-tokenizers, for the parts of real tokenizers whose hash llama.cpp's converter knows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loaders.errors import BadSpec
from loaders.layouts.gguf.tokenizer import pre_name
from tests.pre_tokenizers import GOLDEN

pytestmark = pytest.mark.quick

NAMES: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text())["names"]
BPE = sorted(name for name, found in NAMES.items() if found["model"] == "gpt2")
# Names that llama.cpp cuts text alike for (llm_tokenizer_bpe in src/llama-vocab.cpp); the converter tells them apart by
# the vocabulary, which is no part of a way to cut.
ALIKE = (
    {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"},
    {"gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling"},
    {"llama-bpe", "smaug-bpe", "dbrx"},
)


@pytest.mark.parametrize("name", BPE)
def test_a_name_cuts_as_the_file_s_does_or_is_refused(name: str) -> None:
    found = NAMES[name]
    wanted = {found["file"] or found["converter"] or "gpt-2"}
    try:
        ours = pre_name({"model": {"type": "BPE"}, **found["parts"]})
    except BadSpec:
        return
    assert ours in wanted.union(*(names for names in ALIKE if wanted & names))


@pytest.mark.parametrize("name", [name for name in BPE if name not in ("aquila", "gpt-neox", "mpt", "qwen35")])
def test_the_parts_are_those_of_the_published_tokenizer(name: str) -> None:
    """Not so: aquila, which the table lacks; gpt-neox and mpt, of one vocabulary, which it calls olmo; qwen35, which
    is shipped with Qwen 2's vocabulary."""
    assert NAMES[name]["converter"] == NAMES[name]["file"]
