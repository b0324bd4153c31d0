r"""llama.cpp's converter knows a tokenizer by a hash of the ids that it makes of one text: the same hash, here.

The text is get_vocab_base_pre's (llama.cpp, conversion/base.py), the names are in pre_hashes.json. No library is
needed: a text that is known beforehand has few characters, so that the properties of regular expressions (\p{L}) are
lists of them, and only expressions of our own file are run, never a stranger's.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from loaders.layouts.gguf.tokenizers.byte_letters import byte_letters
from loaders.layouts.gguf.tokenizers.special_tokens import content_of, processors
from loaders.tables import table

HASHES_FILE = Path(__file__).with_name("pre_hashes.json")
Steps = tuple[str, ...]

TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ASCII_PUNCTUATION = "!-/:-@\\[-`{-~"
EXPRESSIONS = {
    "words": GPT2, "digits": r"\p{N}", "numbers": r"\p{N}+", "punctuation": rf"[\p{{P}}{ASCII_PUNCTUATION}]+",
}  # fmt: skip
PROPERTY = re.compile(r"\\p\{(\w+)\}")
MINUS_HAN = re.compile(r"(\[[^\[\]]*)&&\[\^\\p\{Han\}\]\]")


def name_by_hash(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], steps: Steps) -> str | None:
    """Return the converter's name of a byte-level BPE; None if it knows no tokenizer that makes these ids."""
    ids = check_ids(tokenizer, steps)
    return None if ids is None else name_of(ids, tokenizer, settings)


def name_of(ids: Sequence[int], tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Return the converter's name of a tokenizer that makes these ids of the text, without tokens around it.

    The hash was taken with those that transformers puts there: bos if add_bos_token says so, which classes of older
    versions heed, or what the post_processor has.
    """
    added = {each["content"]: each["id"] for each in tokenizer.get("added_tokens") or ()}
    bos = added.get(content_of(settings.get("bos_token")))
    first, last = around(tokenizer)
    outer = [([bos], last)] if bos is not None and settings.get("add_bos_token") is True else []
    for before, after in (*outer, (first, last)):
        digest = hashlib.sha256(str([*before, *ids, *after]).encode()).hexdigest()
        found: str | None = hashes().get(digest)
        if found is not None:
            return found
    return None


def hashes() -> Mapping[str, str]:
    """Return the converter's names by the hashes of the ids that the text has."""
    found: Mapping[str, str] = table(HASHES_FILE)
    return found


def check_ids(tokenizer: Mapping[str, Any], steps: Steps) -> list[int] | None:
    """Return the ids that a byte-level BPE makes of the text; None if it lacks a token for a byte."""
    model, letters = tokenizer["model"], byte_letters()
    vocabulary: Mapping[str, int] = model["vocab"]
    ranks: dict[tuple[str, str], int] = {}
    for merge in model.get("merges") or ():
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault((left, right), len(ranks))
    found: list[int] = []
    for part in apart(tokenizer, TEXT):
        if isinstance(part, int):
            found.append(part)
            continue
        for word in words(unicodedata.normalize("NFC", part) if tokenizer.get("normalizer") else part, steps):
            shown = "".join(letters[byte] for byte in word.encode())
            is_whole = model.get("ignore_merges") and shown in vocabulary
            tokens = [shown] if is_whole else _merged(list(shown), ranks)
            if not all(token in vocabulary for token in tokens):
                return None
            found += [vocabulary[token] for token in tokens]
    return found


def apart(tokenizer: Mapping[str, Any], text: str) -> Iterator[str | int]:
    """Yield the ids of added tokens in a text, the longest first, and the texts between them."""
    added = {each["content"]: each["id"] for each in tokenizer.get("added_tokens") or () if each["content"]}
    there = sorted((content for content in added if content in text), key=len, reverse=True)
    if not there:
        yield text
        return
    for part in re.split("(" + "|".join(map(re.escape, there)) + ")", text):
        if part in added:
            yield added[part]
        elif part:
            yield part


def around(tokenizer: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the ids that the post_processor puts before a text and after it."""
    first: list[int] = []
    last: list[int] = []
    for step in processors(tokenizer):
        if step.get("type") in ("RobertaProcessing", "BertProcessing"):
            first, last = [step["cls"][1]], [step["sep"][1]]
        elif step.get("type") == "TemplateProcessing":
            found, is_before = step.get("special_tokens") or {}, True
            for part in step.get("single") or ():
                if "Sequence" in part:
                    is_before = False
                else:
                    (first if is_before else last).extend(found[part["SpecialToken"]["id"]]["ids"])
    return first, last


def words(text: str, steps: Steps) -> list[str]:
    """Return the words into which a text is cut, one step after another."""
    pieces = [text]
    for step in steps:
        expression = _compiled(EXPRESSIONS.get(step, step))
        pieces = [part for piece in pieces for part in _isolated(expression, piece)]
    return pieces


def _isolated(expression: re.Pattern[str], text: str) -> Iterator[str]:
    """Yield the matches of an expression, and what lies between them."""
    at = 0
    for match in expression.finditer(text):
        if match.end() > match.start():
            if match.start() > at:
                yield text[at : match.start()]
            yield match[0]
            at = match.end()
    if at < len(text):
        yield text[at:]


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    r"""Return an expression of the file for Python, which lacks \p{...} and the intersection of classes."""
    expression = MINUS_HAN.sub(r"(?:(?!\\p{Han})\1])", expression)

    def listed(match: re.Match[str]) -> str:
        before = expression[: match.start()]
        inside = before.count("[") - before.count(r"\[") > before.count("]") - before.count(r"\]")
        found = "".join(re.escape(each) for each in sorted(set(TEXT)) if _has(each, match[1]))
        return found if inside else f"[{found}]"

    return re.compile(PROPERTY.sub(listed, expression))


def _has(character: str, property_: str) -> bool:
    if property_ == "Han":
        return unicodedata.name(character, "").startswith("CJK UNIFIED IDEOGRAPH")
    return unicodedata.category(character).startswith(property_)


def _merged(parts: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Return the tokens of a word: the pair of the lowest rank is merged until none has a rank."""
    while len(parts) > 1:
        pairs = [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not pairs:
            break
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
