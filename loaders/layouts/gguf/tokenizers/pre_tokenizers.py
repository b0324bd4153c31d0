"""The name that llama.cpp has for the way in which a byte-level BPE cuts text into words: tokenizer.ggml.pre.

llama.cpp has every way built in and knows it by name; with a wrong name it silently cuts text wrongly. Its converter
finds the name by a hash of what the tokenizer makes of one text. Here the way is read from tokenizer.json and looked up
in pre_tokenizers.yaml, a tokenizer whose way is unknown being refused. Of several names for one way, the converter's
hash of this tokenizer decides (`check_text`), and else the tokenizer's special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from loaders.errors import BadSpec
from loaders.layouts.gguf.tokenizers.check_text import Steps, name_by_hash
from loaders.tables import table

FORMS_FILE = Path(__file__).with_name("pre_tokenizers.yaml")
# words of the file that stand for pre_tokenizers of the library, and these
WORDS: Mapping[str, Mapping[str, Any]] = {
    "words": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "digits": {"type": "Digits", "individual_digits": True},
    "numbers": {"type": "Digits", "individual_digits": False},
    "punctuation": {"type": "Punctuation", "behavior": "Contiguous"},
}
# names with which llama.cpp takes a whole word that is a token as it is, and those that put bos before every text where
# the metadata do not say whether to (src/llama-vocab.cpp)
IGNORES_MERGES = (
    "minicpm5", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "youtu", "glm4", "glm5", "tekken", "granite-embed-multi-97m",
)  # fmt: skip
ADDS_BOS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
    "chameleon",
)  # fmt: skip


_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Form:
    """A way of cutting text, and its names with their conditions."""

    steps: Steps
    names: tuple[Mapping[str, Any], ...]


@cache
def forms() -> tuple[Form, ...]:
    return tuple(Form(tuple(row["steps"]), tuple(row["names"])) for row in table(FORMS_FILE)["forms"])


def form_named(name: str) -> Form | None:
    """Return the way that has a name of the file, or None."""
    return next((form for form in forms() if any(row["name"] == name for row in form.names)), None)


def known_names() -> tuple[str, ...]:
    return tuple(sorted({row["name"] for form in forms() for row in form.names}))


def one_spelling(regex: str) -> str:
    """Return a regular expression in the spelling of the file: no greed that changes nothing, escapes as escapes."""
    regex = regex.replace("\r", r"\r").replace("\n", r"\n")
    for text, replacement in table(FORMS_FILE)["spellings"]:
        regex = regex.replace(text, replacement)
    return regex


def pre_name(tokenizer: Mapping[str, Any], settings: Mapping[str, Any] = _NONE) -> str:
    """Return llama.cpp's name for the way in which this tokenizer splits text into words.

    `settings` are those of tokenizer_config.json.

    Raises:
        BadSpec: it has none that is known here, or the tokenizer is not a byte-level BPE.
    """
    model = tokenizer.get("model") or {}
    kind = model.get("type", "none") if isinstance(model, Mapping) else "none"
    if kind != "BPE":
        raise BadSpec(
            f"tokenizer.json: its model is {kind}; for gguf, BPE (byte-level or SentencePiece's), WordPiece and Unigram"
            " are converted"
        )
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            raise BadSpec(f"tokenizer.json: its normalizer {short(step)} has no counterpart in llama.cpp")
    steps = steps_of(tokenizer)
    form = next((form for form in forms() if form.steps == steps), None)
    if form is None:
        raise BadSpec(
            f"tokenizer.json: it cuts words by {short(steps)}, which is no way that llama.cpp is known to have"
        )
    by_hash = name_by_hash(tokenizer, settings, form.steps)
    # Two ways may make the same of the converter's text, as Qwen 3.5's does with the vocabulary of Qwen 2.
    if by_hash is not None and form_named(by_hash) in (None, form):
        return by_hash
    return next(str(row["name"]) for row in form.names if _holds(row, tokenizer, model))


def steps_of(tokenizer: Mapping[str, Any]) -> Steps:
    """Return a tokenizer.json's pre_tokenizers in the words of the file.

    Raises:
        BadSpec: one is of a kind that llama.cpp has not, or the bytes are never shown as letters.
    """
    parts = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    steps: list[str] = []
    is_byte_level = False
    for part in parts:
        kind = part.get("type")
        if kind == "ByteLevel" and not is_byte_level and not part.get("add_prefix_space"):
            is_byte_level = True
            steps += ["words"] if part.get("use_regex", True) else []
        elif kind == "Split" and _is_isolating(part):
            steps.append(one_spelling(part["pattern"]["Regex"]))
        elif kind == "Digits":
            steps.append("digits" if part.get("individual_digits") else "numbers")
        elif kind == "Punctuation" and part.get("behavior", "").lower() == "contiguous":
            steps.append("punctuation")
        else:
            raise BadSpec(f"tokenizer.json: its pre_tokenizer {short(part)} is not one that llama.cpp is known to have")
    if not is_byte_level:
        raise BadSpec(
            f"tokenizer.json: its pre_tokenizers {short(parts)} do not show bytes as letters (ByteLevel), as those of"
            " llama.cpp's BPE do"
        )
    return tuple(steps)


def _is_isolating(split: Mapping[str, Any]) -> bool:
    """Whether a Split makes a word of each match: it keeps matches apart, or takes what lies between them away.

    The second, an older way to write the same, is so for expressions that match all text, as those that end with any
    run of spaces do.
    """
    regex = (split.get("pattern") or {}).get("Regex")
    if not isinstance(regex, str):
        return False
    if split.get("behavior") == "Removed" and split.get("invert"):
        return regex.endswith(r"|\s+")
    return split.get("behavior") == "Isolated" and not split.get("invert")


def _holds(row: Mapping[str, Any], tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    if "token" in row:
        added = tokenizer.get("added_tokens") or ()
        return row["token"] in model["vocab"] or any(each["content"] == row["token"] for each in added)
    return "ignores_merges" not in row or model.get("ignore_merges") is row["ignores_merges"]


def _steps(part: Any, inner: str) -> list[Mapping[str, Any]]:
    """Return the steps of a part of tokenizer.json, which may be one step, a sequence under `inner`, or null."""
    if part is None:
        return []
    return list(part[inner]) if part.get("type") == "Sequence" else [part]


def pre_tokenizers(form: Form) -> list[dict[str, Any]]:
    """Return tokenizer.json's pre_tokenizers of a way of cutting text."""
    made: list[dict[str, Any]] = []
    for step in form.steps:
        split = {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        made.append({**WORDS[step], **({"trim_offsets": False} if step == "words" else {})} if step in WORDS else split)
    if "words" not in form.steps:
        made.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False})
    return made


def short(part: object) -> str:
    return json.dumps(part, ensure_ascii=False)[:200]
