"""The vocabulary of a SentencePiece tokenizer as llama.cpp wants it: tokens, scores, token types.

From tokenizer.model it is made as convert_hf_to_gguf.py makes it (llama.cpp, conversion/base.py,
_create_vocab_sentencepiece). From a tokenizer.json alone, tokens and types are those of gguf-py's LlamaHfVocab. That
gives every token the score -1000, with which llama.cpp merges pairs from the left in any order. Here scores follow the
order of the merges instead, as SentencePiece numbers them, so that text is tokenized as in transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loaders.containers.gguf import MetadataValue, float32s, int32s, texts
from loaders.errors import BadSpec
from loaders.layouts.gguf.tokenizers import sentencepiece_model
from loaders.layouts.gguf.tokenizers.sentencepiece_model import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED
from loaders.layouts.gguf.tokenizers.traits import Traits, looks_special
from loaders.storage.base import PinnedFiles
from loaders.storage.json_files import read_json

SPACE = "▁"  # U+2581, which stands for a space in tokens
ABSENT_SCORE, ADDED_SCORE = -10000.0, -1000.0  # what the converter gives to absent and to added tokens
NUL_AS = "🐉"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(slots=True)
class Vocabulary:
    """The tokens' texts, scores and types by id. `adds_prefix` is None for llama.cpp's default, which is true."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    adds_prefix: bool | None = None

    @staticmethod
    def empty(rows: int) -> Vocabulary:
        return Vocabulary([f"[PAD{n}]" for n in range(rows)], [ABSENT_SCORE] * rows, [UNUSED] * rows)

    def metadata(self) -> dict[str, MetadataValue]:
        """Return the keys of a GGUF for the tokens."""
        return {
            "tokenizer.ggml.tokens": texts(self.tokens),
            "tokenizer.ggml.scores": float32s(self.scores),
            "tokenizer.ggml.token_type": int32s(self.types),
        }

    def put(self, number: int, text: str, score: float, kind: int) -> None:
        """Set a token. One that has no row in the embedding is left out, as in the converter."""
        if 0 <= number < len(self.tokens):
            self.tokens[number], self.scores[number], self.types[number] = text, score, kind

    def add(self, number: int, text: str, is_special: bool, *, as_told: bool = False) -> None:
        """Set a token that was added to the model's own. `as_told`: whether it is special, its looks do not matter."""
        if is_special or (not as_told and looks_special(text)):
            self.put(number, text, ADDED_SCORE, CONTROL)
        elif as_told:
            self.put(number, text, ADDED_SCORE, USER_DEFINED)
        else:
            self.put(number, text.replace(SPACE, " "), ADDED_SCORE, USER_DEFINED)


def from_model(
    files: PinnedFiles, name: str, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], traits: Traits, rows: int
) -> Vocabulary:
    """Make the vocabulary from the file `name`, a tokenizer.model, and from the tokens that other files add.

    Raises:
        BadCheckpoint: tokenizer.model is damaged.
        BadSpec: llama.cpp's "llama" does not compute its kind of model, or it has more tokens than the embedding rows.
    """
    model = sentencepiece_model.read_model(files, name)
    if model.model_type != sentencepiece_model.BPE:
        raise BadSpec(
            f"{name}: its model_type is {model.model_type}; llama.cpp cuts text so for BPE (2) only, and would"
            " cut it otherwise here"
        )
    if len(model.pieces) > rows:
        raise BadSpec(f"{name}: it has {len(model.pieces)} tokens, but the embedding has {rows} rows")
    made = Vocabulary.empty(rows)
    for number, piece in enumerate(model.pieces):
        kind = NORMAL if piece.type == USER_DEFINED else piece.type  # the converter does not tell these apart
        if traits.unused and piece.text.startswith(traits.unused):
            kind = UNUSED
        # llama.cpp takes a token of one zero byte for an empty one, and the converter writes this for it (internlm.py).
        made.put(number, NUL_AS if piece.text == "\0" else piece.text, piece.score, kind)
    if files.find("added_tokens.json") is not None:
        for text, number in read_json(files, "added_tokens.json").items():
            made.put(int(number), text, ADDED_SCORE, USER_DEFINED)
    known = settings.get("added_tokens_decoder") or {}
    for each in tokenizer.get("added_tokens", ()):  # transformers 5 writes added tokens only here
        if traits.as_told or (str(each["id"]) not in known and len(model.pieces) <= each["id"]):
            made.add(each["id"], each["content"], bool(each.get("special")), as_told=traits.as_told)
    for number, each in known.items():
        made.add(int(number), each["content"], bool(each.get("special")), as_told=traits.as_told)
    made.adds_prefix = _prefix_setting(settings, model.adds_prefix)
    if traits.adds_prefix is not None:  # what the converter writes for the type, or the model's own where that is false
        made.adds_prefix = traits.adds_prefix and model.adds_prefix
    return made


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json holds a SentencePiece BPE, which in tokenizers' form falls back to bytes."""
    model = tokenizer.get("model") or {}
    return isinstance(model, Mapping) and model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def from_json(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], rows: int) -> Vocabulary:
    """Make the vocabulary from tokenizer.json.

    Raises:
        BadSpec: it changes or splits text in a way that llama.cpp's "llama" does not, or has tokens beyond the rows.
    """
    adds_prefix = _adds_prefix(tokenizer)
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    if max(vocabulary.values(), default=0) >= rows:
        raise BadSpec(f"tokenizer.json: its tokens go to {max(vocabulary.values())}, but the embedding has {rows} rows")
    made = Vocabulary.empty(rows)
    added = {each["content"]: each for each in tokenizer.get("added_tokens", ())}
    for text, score in _scored(tokenizer, vocabulary, set(added)):
        made.put(vocabulary[text], text, score, BYTE if BYTE_TOKEN.fullmatch(text) else NORMAL)
    for text, each in added.items():
        made.add(each["id"], text, bool(each.get("special")))
        if text in vocabulary:
            made.scores[each["id"]] = 0.0
    made.adds_prefix = _prefix_setting(settings, adds_prefix)
    return made


def _prefix_setting(settings: Mapping[str, Any], default: bool) -> bool | None:
    """Return whether a space goes before a text; None for true by default, which the converter does not write."""
    found = settings.get("add_prefix_space")
    return found if isinstance(found, bool) else None if default else False


def _scored(
    tokenizer: Mapping[str, Any], vocabulary: Mapping[str, int], added: set[str]
) -> Iterator[tuple[str, float]]:
    """Yield tokens with scores as SentencePiece gives them: 0, -1, -2, ... in the order of the merges.

    Tokens that no merge makes come after those, by id. Bytes and added tokens have the score 0.
    """
    merged: dict[str, None] = {}
    for merge in tokenizer["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merged[left + right] = None
    rest = sorted(vocabulary, key=vocabulary.__getitem__)
    plain = [t for t in (*merged, *(t for t in rest if t not in merged)) if t in vocabulary]
    rank = 0
    for text in plain:
        if text in added or BYTE_TOKEN.fullmatch(text):
            yield text, 0.0
        else:
            yield text, -float(rank)
            rank += 1


def _adds_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text.

    Raises:
        BadSpec: it changes or splits text in another way than llama.cpp.
    """
    found = False
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step == {"type": "Prepend", "prepend": SPACE}:
            found = True
        elif step.get("type") != "Replace" or step.get("pattern") != {"String": " "} or step.get("content") != SPACE:
            raise BadSpec(f"tokenizer.json: its normalizer {_short(step)} has no counterpart in llama.cpp")
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Split" and step.get("pattern") == {"String": " "}:
            continue  # The normalizer has replaced all spaces before, as in Gemma 3.
        if step.get("type") != "Metaspace" or step.get("replacement") != SPACE or step.get("split"):
            raise BadSpec(
                f"tokenizer.json: its pre_tokenizer {_short(step)} is not one that llama.cpp is known to have"
            )
        scheme = step.get("prepend_scheme")
        found = found or (bool(step.get("add_prefix_space")) if scheme is None else scheme != "never")
    return found


def _steps(part: Any, inner: str) -> list[Mapping[str, Any]]:
    """Return the steps of a part of tokenizer.json, which may be one step, a sequence under `inner`, or null."""
    if part is None:
        return []
    return list(part[inner]) if part.get("type") == "Sequence" else [part]


def _short(part: object) -> str:
    return json.dumps(part, ensure_ascii=False)[:200]
