"""Names of pre-tokenizers, on the parts of real vocabularies that tests/pre_tokenizers.py has kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loaders.layouts.gguf.tokenizers import check_text, pre_tokenizers
from loaders.layouts.gguf.tokenizers.vocabularies import wordpiece_name
from loaders.places import ROOT
from tests.pre_tokenizers import GOLDEN, TABLE, table_of

GOLDENS: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", GOLDENS)
def test_a_real_vocabulary_has_the_converters_name(name: str) -> None:
    golden = GOLDENS[name]
    document, settings = golden["tokenizer"], golden.get("settings", {})
    find = wordpiece_name if document["model"]["type"] == "WordPiece" else pre_tokenizers.pre_name
    assert find(document, settings) == golden["name"]


def test_forms_are_spelled_as_they_are_looked_up() -> None:
    for form in pre_tokenizers.forms():
        assert tuple(pre_tokenizers.one_spelling(step) for step in form.steps) == form.steps
        assert pre_tokenizers.steps_of({"pre_tokenizer": {"type": "Sequence",
                                                          "pretokenizers": pre_tokenizers.pre_tokenizers(form)}}
                                       ) == form.steps  # fmt: skip
        assert "".join(check_text.words(check_text.TEXT, form.steps)) == check_text.TEXT


def test_of_several_names_for_one_way_the_hash_decides_and_else_a_token() -> None:
    document = GOLDENS["llama-bpe"]["tokenizer"]
    assert pre_tokenizers.pre_name({**document, "post_processor": None}) == "smaug-bpe"  # without bos, the same ids
    other = {**document, "model": {**document["model"], "vocab": {"a": 0}, "ignore_merges": False}}
    assert pre_tokenizers.pre_name(other) == "dbrx"
    special = [{"id": 1, "content": "[gMASK]"}]
    assert pre_tokenizers.pre_name({**other, "added_tokens": special}) == "glm4"


def test_a_hash_of_another_way_of_cutting_text_does_not_count() -> None:
    document = GOLDENS["qwen2"]["tokenizer"]
    form = pre_tokenizers.form_named("qwen35")
    assert form is not None
    steps = {"type": "Sequence", "pretokenizers": pre_tokenizers.pre_tokenizers(form)}
    assert pre_tokenizers.pre_name({**document, "pre_tokenizer": steps}) == "qwen35"


def test_an_older_spelling_is_the_same_way() -> None:
    """As OpenAI's tokenizers were first written for transformers: matches are taken away, inverted."""
    form = pre_tokenizers.form_named("llama-bpe")
    assert form is not None
    regex = form.steps[0].replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    assert pre_tokenizers.steps_of({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, last]}}) == (
        form.steps
    )


def test_the_documented_table_is_up_to_date() -> None:
    assert Path(ROOT / TABLE).read_text(encoding="utf-8") == table_of(GOLDENS)
