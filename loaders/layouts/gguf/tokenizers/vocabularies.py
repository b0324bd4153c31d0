"""The vocabularies of encoders, and Gemma 4's: WordPiece, Unigram, and BPE over text with ▁ for spaces.

Each is made as llama.cpp's converter makes it (conversion/bert.py, t5.py, gemma.py).
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from loaders.containers.gguf import MetadataValue, boolean, int32s, text, texts, uint8s
from loaders.errors import BadCheckpoint, BadSpec
from loaders.layouts.gguf.tokenizers import sentencepiece_model
from loaders.layouts.gguf.tokenizers.check_text import TEXT, apart, name_of
from loaders.layouts.gguf.tokenizers.sentencepiece import ADDED_SCORE, BYTE_TOKEN, SPACE, Vocabulary
from loaders.layouts.gguf.tokenizers.sentencepiece_model import BYTE, CONTROL, NORMAL, UNIGRAM, UNKNOWN, USER_DEFINED
from loaders.layouts.gguf.tokenizers.special_tokens import content_of
from loaders.storage.base import PinnedFiles

CONTINUING = "##"
LONGEST_WORD = 100  # letters: BERT takes a longer word for an unknown one
# Gemma 4's tokens that llama.cpp always shows, so that its parser of answers can read them
VISIBLE = (
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
)  # fmt: skip
XLM_ROBERTA_FILE = "sentencepiece.bpe.model"
T5_FILE = "spiece.model"


# --- WordPiece


def wordpiece_metadata(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, MetadataValue]:
    """Return the keys of a WordPiece vocabulary, in which a word begins with ▁ and what continues one with nothing."""
    _check_wordpiece(tokenizer)
    normalizer = tokenizer.get("normalizer") or {}
    flags = {
        f"tokenizer.ggml.normalizer.{key}": boolean(normalizer[key])
        for key in ("lowercase", "strip_accents")
        if isinstance(normalizer.get(key), bool)
    }
    shown = [
        token if kind == CONTROL else token.removeprefix(CONTINUING) if token.startswith(CONTINUING) else SPACE + token
        for token, kind in zip(tokens, types, strict=True)
    ]
    return {
        "tokenizer.ggml.model": text("bert"),
        "tokenizer.ggml.pre": text(wordpiece_name(tokenizer, settings)),
        "tokenizer.ggml.tokens": texts(shown),
        "tokenizer.ggml.token_type": int32s(types),
        **flags,
    }


def _check_wordpiece(tokenizer: Mapping[str, Any]) -> None:
    """Raise BadSpec if text is changed or cut in another way than BERT's, the only one that llama.cpp has."""
    for part, wanted in (("normalizer", "BertNormalizer"), ("pre_tokenizer", "BertPreTokenizer")):
        found = (tokenizer.get(part) or {}).get("type")
        if found != wanted:
            raise BadSpec(f"tokenizer.json: llama.cpp computes WordPiece with {wanted} only; its {part} is {found}")
    prefix = tokenizer["model"].get("continuing_subword_prefix", CONTINUING)
    if prefix != CONTINUING:
        raise BadSpec(f"tokenizer.json: llama.cpp takes {CONTINUING} for what continues a word; here it is {prefix!r}")


def wordpiece_name(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the converter's name of the tokenizer, by its hash. llama.cpp does not heed it for WordPiece."""
    vocabulary: Mapping[str, int] = tokenizer["model"]["vocab"]
    unknown = vocabulary.get(tokenizer["model"].get("unk_token", "[UNK]"))
    ids: list[int] = []
    for part in apart(tokenizer, TEXT):
        if isinstance(part, int):
            ids.append(part)
            continue
        for word in bert_words(part, tokenizer.get("normalizer") or {}):
            found = _pieces(word, vocabulary)
            if found is None:
                if unknown is None:
                    return "default"
                found = [unknown]
            ids += found
    return name_of(ids, tokenizer, settings) or "default"


def bert_words(part: str, normalizer: Mapping[str, Any]) -> list[str]:
    """Return the words into which BERT cuts a text: at spaces, and at every mark and every character of Chinese."""
    lower = bool(normalizer.get("lowercase", True))
    strips = normalizer.get("strip_accents")
    cleaned = [" " if each.isspace() else each for each in part if each.isspace() or not _is_control(each)]
    if normalizer.get("handle_chinese_chars", True):
        cleaned = [f" {each} " if _is_chinese(each) else each for each in cleaned]
    whole = "".join(cleaned)
    if lower if strips is None else strips:
        whole = "".join(each for each in unicodedata.normalize("NFD", whole) if unicodedata.category(each) != "Mn")
    if lower:
        whole = whole.lower()
    return "".join(f" {each} " if _is_mark(each) else each for each in whole).split()


def _is_control(character: str) -> bool:
    return unicodedata.category(character).startswith("C") or character == "\ufffd"


def _is_chinese(character: str) -> bool:
    return unicodedata.name(character, "").startswith("CJK UNIFIED IDEOGRAPH")


def _is_mark(character: str) -> bool:
    is_ascii = character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    return is_ascii or unicodedata.category(character).startswith("P")


def _pieces(word: str, vocabulary: Mapping[str, int]) -> list[int] | None:
    """Return the longest tokens that make up a word, from the left; None if there are none."""
    found, at = [], 0
    while at < len(word) <= LONGEST_WORD:
        before = CONTINUING if at else ""
        end = next((end for end in range(len(word), at, -1) if before + word[at:end] in vocabulary), None)
        if end is None:
            return None
        found.append(vocabulary[before + word[at:end]])
        at = end
    return found if at else None


# --- Unigram


def unigram_metadata(
    made: Vocabulary, adds_prefix: bool, removes_spaces: bool, charsmap: bytes
) -> dict[str, MetadataValue]:
    """Return the keys of a Unigram vocabulary."""
    found = {
        "tokenizer.ggml.model": text("t5"),
        "tokenizer.ggml.pre": text("default"),
        **made.metadata(),
        "tokenizer.ggml.add_space_prefix": boolean(adds_prefix),
        "tokenizer.ggml.remove_extra_whitespaces": boolean(removes_spaces),
    }
    return found | ({"tokenizer.ggml.precompiled_charsmap": uint8s(charsmap)} if charsmap else {})


def unigram_of_model(files: PinnedFiles, name: str, rows: int) -> dict[str, MetadataValue]:
    """Return the keys of a Unigram model of SentencePiece.

    XLM-RoBERTa's tokenizer puts its special tokens before the model's, which begin with others and end up one later.

    Raises:
        BadSpec: the model is of another kind.
        BadCheckpoint: the file is damaged.
    """
    model = sentencepiece_model.read_model(files, name)
    if model.model_type != UNIGRAM:
        raise BadSpec(f"{name}: its model_type is {model.model_type}; llama.cpp's t5 computes Unigram (1)")
    made = Vocabulary.empty(rows)
    pieces = [(piece.text, piece.score, NORMAL if piece.type == USER_DEFINED else piece.type) for piece in model.pieces]
    if name == XLM_ROBERTA_FILE:
        first = [("<s>", 0.0, CONTROL), ("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
        pieces = first + pieces[3:]
        made.put(len(pieces), "<mask>", 0.0, CONTROL)
    for number, (token, score, kind) in enumerate(pieces):
        made.put(number, token, score, kind)
    return unigram_metadata(made, model.adds_prefix, model.removes_spaces, model.charsmap)


def unigram_of_json(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], rows: int
) -> tuple[dict[str, MetadataValue], dict[str, int]]:
    """Return the keys of a tokenizer.json's Unigram, and the ids of its tokens.

    Raises:
        BadSpec: text is changed or cut in a way that llama.cpp has not.
        BadCheckpoint: the map of characters is no base64.
    """
    charsmap, adds_prefix, model = b"", False, tokenizer["model"]
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step.get("type") == "Precompiled":
            charsmap = _decoded(step.get("precompiled_charsmap") or "")
        elif step.get("type") != "Replace" or step.get("content") not in (" ", SPACE):
            raise BadSpec(f"tokenizer.json: its normalizer {str(step)[:200]} has no counterpart in llama.cpp's t5")
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            scheme = step.get("prepend_scheme")
            adds_prefix = bool(step.get("add_prefix_space", True)) if scheme is None else scheme != "never"
        elif step.get("type") != "WhitespaceSplit":
            raise BadSpec(f"tokenizer.json: its pre_tokenizer {str(step)[:200]} is none that llama.cpp's t5 has")
    named = named_tokens(settings)
    added = {each["id"]: each for each in tokenizer.get("added_tokens") or ()}
    made = Vocabulary.empty(rows)
    for number, (token, score) in enumerate(model["vocab"]):
        kind = UNKNOWN if number == model.get("unk_id") else CONTROL if token in named else NORMAL
        made.put(number, token, float(score), USER_DEFINED if kind == NORMAL and number in added else kind)
    for number, each in added.items():
        if number >= len(model["vocab"]):
            made.add(number, each["content"], bool(each.get("special")))
    removes = bool(settings.get("clean_up_tokenization_spaces", False))
    ids = {token: number for number, (token, _) in enumerate(model["vocab"])}
    return unigram_metadata(made, adds_prefix, removes, charsmap), ids


def _decoded(charsmap: str) -> bytes:
    try:
        return base64.b64decode(charsmap, validate=True)
    except (binascii.Error, ValueError):
        raise BadCheckpoint("tokenizer.json: its precompiled_charsmap is no base64; fetch it again") from None


def _steps(part: Any, inner: str) -> list[Mapping[str, Any]]:
    """Return the steps of a part of tokenizer.json, which may be one step, a sequence under `inner`, or null."""
    if part is None:
        return []
    return list(part[inner]) if part.get("type") == "Sequence" else [part]


def named_tokens(settings: Mapping[str, Any]) -> set[str]:
    """Return the tokens that tokenizer_config.json names as special, by a role or in a list."""
    found = {content_of(value) for key, value in settings.items() if key.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or ()
        found |= {content_of(each) for each in (more.values() if isinstance(more, Mapping) else more)}
    return {each for each in found if each}


# --- Gemma 4


def gemma4_metadata(
    tokenizer: Mapping[str, Any], settings: Mapping[str, Any], merges: Sequence[str], rows: int
) -> dict[str, MetadataValue]:
    """Return the keys of Gemma 4's BPE: tokens over text, with the merges in their order.

    Raises:
        BadSpec: it has more tokens than the embedding has rows.
    """
    model, named = tokenizer["model"], named_tokens(settings)
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise BadSpec(
            f"tokenizer.json: for llama.cpp's gemma4, expected a BPE that falls back to bytes, found"
            f" {model.get('type', 'none')}"
        )
    vocabulary: Mapping[str, int] = model["vocab"]
    if max(vocabulary.values(), default=0) >= rows:
        raise BadSpec(f"tokenizer.json: its tokens go to {max(vocabulary.values())}, but the embedding has {rows} rows")
    made = Vocabulary.empty(rows)
    added = {each["content"]: each["id"] for each in tokenizer.get("added_tokens") or ()}
    for token, number in {**vocabulary, **added}.items():
        usual = NORMAL if token in vocabulary else USER_DEFINED
        kind = BYTE if BYTE_TOKEN.fullmatch(token) else CONTROL if token in named else usual
        made.put(number, token, ADDED_SCORE, USER_DEFINED if token in VISIBLE else kind)
    return {
        "tokenizer.ggml.model": text("gemma4"),
        **made.metadata(),
        "tokenizer.ggml.merges": texts(merges),
        "tokenizer.ggml.add_space_prefix": boolean(False),
    }
