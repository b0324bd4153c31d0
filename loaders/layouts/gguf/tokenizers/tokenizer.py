"""A tokenizer as llama.cpp's metadata: byte-level BPE, SentencePiece, and the vocabularies of encoders.

Keys and token types are those of gguf-py (gguf/constants.py, gguf/vocab.py), values those of llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from loaders.containers.gguf import MetadataValue, boolean, float32s, int32s, text, texts, uint32
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.layouts.gguf.generation import end_metadata, end_tokens, left_out, read_generation
from loaders.layouts.gguf.tokenizers import tekken, tiktoken, vocabularies
from loaders.layouts.gguf.tokenizers.added_tokens import added_elsewhere
from loaders.layouts.gguf.tokenizers.chat_templates import template_metadata, templates_of
from loaders.layouts.gguf.tokenizers.pre_tokenizers import ADDS_BOS, pre_name
from loaders.layouts.gguf.tokenizers.sentencepiece import SPACE, Vocabulary, from_json, from_model, is_sentencepiece
from loaders.layouts.gguf.tokenizers.special_tokens import content_of, read_special, special_ids, special_metadata
from loaders.layouts.gguf.tokenizers.traits import Traits, looks_special, traits_of
from loaders.storage.base import PinnedFiles
from loaders.storage.json_files import read_json
from loaders.words import counted

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf-py's TokenType
MODELS = ("tokenizer.model", "tokenizer.model.v3")  # SentencePiece's; the second is Mamba-Codestral's name of it
UNIGRAM_MODELS = {"xlm-roberta": vocabularies.XLM_ROBERTA_FILE, "t5": vocabularies.T5_FILE}
# CodeLlama's tokens for filling in the middle, which llama.cpp's converter recognizes by the size of the vocabulary
CODE_LLAMA_ROWS = 32016
CODE_LLAMA_IDS = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
MODEL_KEY, PRE_KEY = "tokenizer.ggml.model", "tokenizer.ggml.pre"
UNKNOWN_BY_DEFAULT = 0  # the token that llama.cpp takes for unknown where a SentencePiece vocabulary says nothing


def tokenizer_metadata(
    files: PinnedFiles, config: Mapping[str, Any], rows: int
) -> tuple[dict[str, MetadataValue], list[str]]:
    """Return tokenizer.ggml.* for a model whose embedding has `rows` rows, and what of the tokenizer they do not hold.

    Raises:
        BadSpec: there is no tokenizer, or one that llama.cpp has no counterpart for.
        BadCheckpoint: its files are damaged.
    """
    try:
        tokenizer, settings = (
            read_json(files, name) if files.find(name) is not None else {}
            for name in ("tokenizer.json", "tokenizer_config.json")
        )
        templates, generation = templates_of(files, settings), read_generation(files)
        found = _vocabulary(files, tokenizer, settings, config, rows)
        ends = end_tokens(generation, config)
        found |= end_metadata(found, ends)
        notes = [*left_out(generation, ends, found), *_left_out(tokenizer, settings, templates)]
        return found | template_metadata(templates), notes
    # What reading JSON of another shape than tokenizers writes raises.
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise BadCheckpoint(f"tokenizer.json: not as tokenizers writes it ({type(error).__name__}: {error})") from None


def _vocabulary(
    files: PinnedFiles, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any], rows: int
) -> dict[str, MetadataValue]:
    """Return the keys of the vocabulary and of its special tokens, by the kind that the files have."""
    traits = traits_of(config)
    model = next((name for name in MODELS if files.find(name) is not None), None)
    unigram = UNIGRAM_MODELS.get(str(config.get("model_type")))
    if unigram is not None and files.find(unigram) is not None:
        found = vocabularies.unigram_of_model(files, unigram, rows)
        return _with_special(found, tokenizer, settings, config, traits)
    if not tokenizer:
        return _without_json(files, model, settings, config, traits, rows)
    whole = _completed(files, tokenizer, settings, rows)
    if traits.kind == "gemma4":
        found = vocabularies.gemma4_metadata(whole, settings, _merges(whole), rows)
        return _with_special(found, whole, settings, config, traits) | {"tokenizer.ggml.add_bos_token": boolean(True)}
    # Llama 3 has a tokenizer.model that is not SentencePiece's, so tokenizer.json decides what the tokenizer is.
    if is_sentencepiece(tokenizer):
        if model is not None:
            made = from_model(files, model, tokenizer, settings, traits, rows)
        else:
            made = from_json(whole, settings, rows)
            made.adds_prefix = made.adds_prefix if traits.adds_prefix_of_json is None else traits.adds_prefix_of_json
        return _sentencepiece(made, whole, settings, config, traits)
    kind = (tokenizer.get("model") or {}).get("type")
    if kind == "Unigram":
        found, _ = vocabularies.unigram_of_json(whole, settings, rows)
        return _with_special(found, whole, settings, config, traits)
    if kind == "WordPiece":
        tokens, types = _tokens(whole, rows)
        found = vocabularies.wordpiece_metadata(whole, settings, tokens, types)
        return _with_special(found, whole, settings, config, traits, tokens=tokens)
    return _byte_level(whole, settings, config, traits, rows)


def _without_json(
    files: PinnedFiles,
    model: str | None,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    traits: Traits,
    rows: int,
) -> dict[str, MetadataValue]:
    """Return the keys from a file of another library than tokenizers. `model` is SentencePiece's, if there is one."""
    own = tiktoken.find(files)
    if files.find(tekken.FILE) is not None:
        scores = {"tokenizer.ggml.scores": float32s((0.0,) * rows)}  # which the converter writes here, and only here
        return _byte_level(tekken.read_tekken(files), {**tekken.SETTINGS, **settings}, config, traits, rows) | scores
    if own is not None:
        document, settings = tiktoken.read_tiktoken(files, own, settings)
        return _byte_level(document, settings, config, traits, rows, pre=own.pre)
    if model is None:
        raise BadSpec(
            f"{setting('layout')}: gguf needs the tokenizer, and {files.address} has no tokenizer.json; fetch it"
        )
    return _sentencepiece(from_model(files, model, {}, settings, traits, rows), {}, settings, config, traits)


def _completed(
    files: PinnedFiles, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], rows: int
) -> Mapping[str, Any]:
    """Return a tokenizer.json with the tokens that other files add, but those without a row in the embedding."""
    more = [asdict(token) for token in added_elsewhere(files, tokenizer, settings) if token.id < rows]
    return {**tokenizer, "added_tokens": [*(tokenizer.get("added_tokens") or ()), *more]} if more else tokenizer


def _sentencepiece(
    made: Vocabulary,
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    traits: Traits,
) -> dict[str, MetadataValue]:
    """Return the keys of a SentencePiece BPE."""
    found = {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        **made.metadata(),
    }
    if isinstance(made.adds_prefix, bool):
        found["tokenizer.ggml.add_space_prefix"] = boolean(made.adds_prefix)
    return _with_special(found, tokenizer, settings, config, traits)


def _byte_level(
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    traits: Traits,
    rows: int,
    *,
    pre: str | None = None,
) -> dict[str, MetadataValue]:
    """Return the keys of a byte-level BPE. `pre` is llama.cpp's name of its way of cutting text, if it is known."""
    pre = pre_name(tokenizer, settings) if pre is None else pre
    tokens, types = _tokens(tokenizer, rows)
    found = {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(pre),
        "tokenizer.ggml.tokens": texts(tokens),
        "tokenizer.ggml.token_type": int32s(types),
        "tokenizer.ggml.merges": texts(_merges(tokenizer)),
    }
    if traits.tells_prefix and isinstance(settings.get("add_prefix_space"), bool):
        found["tokenizer.ggml.add_space_prefix"] = boolean(settings["add_prefix_space"])
    return _with_special(found, tokenizer, settings, config, traits)


def _tokens(tokenizer: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the texts and types of the tokens by id.

    Raises:
        BadSpec: a token has no row in the embedding.
    """
    vocabulary = dict(tokenizer["model"]["vocab"])
    added = {each["content"]: each for each in tokenizer.get("added_tokens") or ()}
    vocabulary |= {content: each["id"] for content, each in added.items()}
    by_id = {number: token for token, number in vocabulary.items()}
    if not all(type(number) is int and 0 <= number < rows for number in by_id):
        raise BadSpec(f"tokenizer.json: its tokens go to {max(by_id)}, but the embedding has {rows} rows")
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for number, token in by_id.items():
        if token not in added:
            tokens[number], types[number] = token, NORMAL
        elif added[token].get("special") or looks_special(token):
            tokens[number], types[number] = token, CONTROL
        else:
            tokens[number], types[number] = token.replace(SPACE, " "), USER_DEFINED
    return tokens, types


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return the merges, a text each.

    Raises:
        BadSpec: a part of one has a space.
    """
    found = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    broken = [merge for merge in found if merge.count(" ") != 1]
    if broken:
        raise BadSpec(f"tokenizer.json: GGUF cannot hold the merge {broken[0]!r}, whose parts have spaces")
    return found


def _with_special(
    found: dict[str, MetadataValue],
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    traits: Traits,
    *,
    tokens: list[str] | None = None,
) -> dict[str, MetadataValue]:
    """Return the keys of a vocabulary with those of its special tokens.

    `tokens` are the tokens' texts where the keys have others.
    """
    kind, pre = (str(found[key].value) if key in found else "" for key in (MODEL_KEY, PRE_KEY))
    texts_by_id = found["tokenizer.ggml.tokens"].value if tokens is None else tokens
    vocabulary, rows = {token: number for number, token in enumerate(texts_by_id)}, len(texts_by_id)
    special = read_special(tokenizer, settings)
    ids = special_ids(special, config, vocabulary, rows)
    if kind == "llama" and not tokenizer and ids.get("unknown") == UNKNOWN_BY_DEFAULT:
        del ids["unknown"]
    if kind == "llama" and rows == CODE_LLAMA_ROWS:
        ids |= CODE_LLAMA_IDS
    if traits.end_of_chat in vocabulary:
        ids["eos"] = vocabulary[traits.end_of_chat]
    if traits.end_of_document and type(config.get("eod_token_id")) is int and 0 <= config["eod_token_id"] < rows:
        ids["eos"] = config["eod_token_id"]
    ids = {key: vocabulary[token] for key, token in traits.tokens.items() if token in vocabulary} | ids
    ids |= {key: number for key, number in traits.ids.items() if number < rows}
    if rows == traits.no_bos_with:
        special.adds["bos"] = False
    bos_by_default = kind == "llama" or (kind == "gpt2" and pre in ADDS_BOS)
    found |= special_metadata(ids, special, tokenizer, settings, bos_by_default=bos_by_default)
    if traits.counts_token_types:
        count = config.get("type_vocab_size", 1)
        found["tokenizer.ggml.token_type_count"] = uint32(count if type(count) is int and count >= 0 else 1)
    return found


def _left_out(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], templates: Mapping[str, str]) -> Iterator[str]:
    """Say what of a tokenizer a GGUF has no place for."""
    decoder = settings.get("added_tokens_decoder") or {}
    added = {each["content"]: each for each in (*decoder.values(), *tokenizer.get("added_tokens", ()))}
    for flag, what in (
        ("lstrip", "take the spaces before them"), ("rstrip", "take the spaces after them"),
        ("single_word", "count only as words of their own"),
    ):  # fmt: skip
        names = [content for content, each in added.items() if each.get(flag)]
        if names:
            yield f"{counted(len(names), 'added token')} {what} ({flag}), {names[0]!r} first"
    if settings.get("cls_token") not in (None, settings.get("bos_token")):
        yield f"cls_token {content_of(settings['cls_token'])!r}"
    renamed = [name for name in templates if re.search("[^A-Za-z0-9_]", name)]
    if renamed:
        yield f"names of chat templates: {', '.join(renamed)} get _ for what is no letter or digit"
