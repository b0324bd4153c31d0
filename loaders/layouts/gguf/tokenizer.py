"""A tokenizer as llama.cpp's metadata: SentencePiece, or byte-level BPE with the name of its pre-tokenizer.

llama.cpp has every pre-tokenizer built in and knows it by a name, tokenizer.ggml.pre; with a wrong name it silently
splits text wrongly. Here the name is found by the regular expression that tokenizer.json holds, and a tokenizer whose
expression is unknown is refused. Keys and token types are those of gguf-py (gguf/constants.py, gguf/vocab.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from loaders.containers.gguf import MetadataValue, boolean, float32s, int32s, text, texts, uint32
from loaders.errors import BadCheckpoint, BadSpec, setting
from loaders.layouts.gguf import tekken
from loaders.layouts.gguf.added_tokens import added_elsewhere
from loaders.layouts.gguf.chat_templates import template_metadata, templates_of
from loaders.layouts.gguf.generation import end_metadata, end_tokens, left_out, read_generation
from loaders.layouts.gguf.sentencepiece import Vocabulary, from_json, from_model, is_sentencepiece
from loaders.storage.base import PinnedFiles
from loaders.storage.json_files import read_json
from loaders.words import counted

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf-py's TokenType
MODEL = "tokenizer.model"
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>")
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# the regular expression that splits text into words -> llama.cpp's name (src/llama-vocab.cpp)
PRE_BY_REGEX = {
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")  # classes of transformers that add nothing by themselves
# CodeLlama's tokens for filling in the middle, which llama.cpp's converter recognizes by the size of the vocabulary
CODE_LLAMA_ROWS = 32016
CODE_LLAMA_IDS = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
# llama.cpp's name of a special token (misspelled there) -> transformers'
SPECIAL = {
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token",
    "seperator": "sep_token", "mask": "mask_token",
}  # fmt: skip


def tokenizer_metadata(
    files: PinnedFiles, config: Mapping[str, Any], rows: int
) -> tuple[dict[str, MetadataValue], list[str]]:
    """Return tokenizer.ggml.* for a model whose embedding has `rows` rows, and what of the tokenizer they do not hold.

    Raises:
        BadSpec: there is no tokenizer, or one that llama.cpp has no counterpart for.
        BadCheckpoint: its files are damaged.
    """
    has_model, has_json = (files.find(name) is not None for name in (MODEL, "tokenizer.json"))
    is_tekken = not has_json and files.find(tekken.FILE) is not None
    if not has_json and not has_model and not is_tekken:
        raise BadSpec(
            f"{setting('layout')}: gguf needs the tokenizer, and {files.address} has no tokenizer.json; fetch it"
        )
    try:
        tokenizer, settings = (
            read_json(files, name) if files.find(name) is not None else {}
            for name in ("tokenizer.json", "tokenizer_config.json")
        )
        if is_tekken:
            tokenizer, settings = tekken.read_tekken(files), {**tekken.SETTINGS, **settings}
        # Mistral's own file has all of its tokens.
        whole = tokenizer if is_tekken or not tokenizer else _completed(files, tokenizer, settings, rows)
        templates, generation = templates_of(files, settings), read_generation(files)
        # Llama 3 has a tokenizer.model that is not SentencePiece's, so tokenizer.json decides what the tokenizer is.
        if not tokenizer or is_sentencepiece(tokenizer):
            made = from_model(files, tokenizer, settings, rows) if has_model else from_json(whole, settings, rows)
            found = _sentencepiece_metadata(made, tokenizer, settings, config)
        else:
            found = _metadata(whole, settings, config, rows)
        ends = end_tokens(generation, config)
        found |= end_metadata(found, ends)
        notes = [*left_out(generation, ends, found), *_left_out(tokenizer, settings, templates)]
        return found | template_metadata(templates), notes
    # What reading JSON of another shape than tokenizers writes raises.
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadCheckpoint(f"tokenizer.json: not as tokenizers writes it ({type(error).__name__}: {error})") from None


def _completed(
    files: PinnedFiles, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], rows: int
) -> Mapping[str, Any]:
    """Return a tokenizer.json with the tokens that other files add, but those without a row in the embedding."""
    more = [asdict(token) for token in added_elsewhere(files, tokenizer, settings) if token.id < rows]
    return {**tokenizer, "added_tokens": [*(tokenizer.get("added_tokens") or ()), *more]} if more else tokenizer


def _sentencepiece_metadata(
    made: Vocabulary,
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, MetadataValue]:
    """Return the keys of a SentencePiece vocabulary, with special tokens from transformers' files."""
    found = {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": texts(made.tokens),
        "tokenizer.ggml.scores": float32s(made.scores),
        "tokenizer.ggml.token_type": int32s(made.types),
    }
    if isinstance(made.adds_prefix, bool):
        found["tokenizer.ggml.add_space_prefix"] = boolean(made.adds_prefix)
    rows, vocabulary = len(made.tokens), {token: number for number, token in enumerate(made.tokens)}
    ids = {name: _special_id(settings.get(key), config.get(f"{key}_id"), vocabulary) for name, key in SPECIAL.items()}
    if rows == CODE_LLAMA_ROWS:
        ids |= CODE_LLAMA_IDS
    found |= {
        f"tokenizer.ggml.{name}_token_id": uint32(number)
        for name, number in ids.items()
        if number is not None and number < rows
    }
    for name in ("bos", "eos"):
        says = f"add_{name}_token" in settings or tokenizer.get("post_processor") is not None
        # Where no file says it, LlamaTokenizer does what is llama.cpp's default: it adds bos, and no eos.
        if says or str(settings.get("tokenizer_class", "Llama")).startswith(GENERIC):
            adds = _adds(name, tokenizer, settings, made.tokens, ids[name])
            found[f"tokenizer.ggml.add_{name}_token"] = boolean(adds)
    return found


def _metadata(
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    rows: int,
) -> dict[str, MetadataValue]:
    """Return the keys of a byte-level BPE."""
    pre = pre_name(tokenizer)
    vocabulary = dict(tokenizer["model"]["vocab"])
    added = {each["content"]: each for each in tokenizer.get("added_tokens", ())}
    vocabulary |= {content: each["id"] for content, each in added.items()}
    by_id = {number: token for token, number in vocabulary.items()}
    if not all(type(number) is int and 0 <= number < rows for number in by_id):
        raise BadSpec(f"tokenizer.json: its tokens go to {max(by_id)}, but the embedding has {rows} rows")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [_type(by_id.get(number), added) for number in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    broken = [merge for merge in merges if merge.count(" ") != 1]
    if broken:
        raise BadSpec(f"tokenizer.json: GGUF cannot hold the merge {broken[0]!r}, whose parts have spaces")
    found = {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(pre),
        "tokenizer.ggml.tokens": texts(tokens),
        "tokenizer.ggml.token_type": int32s(types),
        "tokenizer.ggml.merges": texts(merges),
    }
    ids = {name: _special_id(settings.get(key), config.get(f"{key}_id"), vocabulary) for name, key in SPECIAL.items()}
    found |= {f"tokenizer.ggml.{name}_token_id": uint32(number) for name, number in ids.items() if number is not None}
    for name in ("bos", "eos"):
        found[f"tokenizer.ggml.add_{name}_token"] = boolean(_adds(name, tokenizer, settings, tokens, ids[name]))
    return found


def _type(token: str | None, added: Mapping[str, Any]) -> int:
    """Return a token's type; None is a row of the embedding without a token."""
    if token is None:
        return UNUSED
    if token not in added:
        return NORMAL
    return CONTROL if added[token].get("special") or LOOKS_SPECIAL.fullmatch(token) else USER_DEFINED


def pre_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which this tokenizer splits text into words.

    Raises:
        BadSpec: it has none that is known here, or the tokenizer is not a byte-level BPE.
    """
    model = tokenizer.get("model") or {}
    kind = model.get("type", "none") if isinstance(model, Mapping) else "none"
    if kind != "BPE":
        raise BadSpec(f"tokenizer.json: its model is {kind}; for gguf, BPE is converted: byte-level or SentencePiece's")
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise BadSpec(f"tokenizer.json: its normalizer {_short(normalizer)} has no counterpart in llama.cpp")
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", ()) if steps.get("type") == "Sequence" else (steps,)
    *before, last = steps or ({},)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise BadSpec(f"tokenizer.json: its pre_tokenizer {_short(last)} is not one that llama.cpp is known to have")
    if not before and last.get("use_regex", True):
        return "gpt-2"
    if len(before) == 1 and before[0].get("type") == "Split" and not last.get("use_regex", True):
        pattern = before[0].get("pattern") or {}
        name = PRE_BY_REGEX.get(pattern.get("Regex", ""))
        if name is not None and before[0].get("behavior") == "Isolated" and not before[0].get("invert"):
            return name
    if [step.get("type") for step in before] == ["Digits"] and before[0].get("individual_digits"):
        return "smollm"
    raise BadSpec(f"tokenizer.json: it cuts words by {_short(before)}, which is no way that llama.cpp is known to have")


def _short(part: object) -> str:
    return json.dumps(part, ensure_ascii=False)[:200]


def _special_id(name: Any, number: Any, vocabulary: Mapping[str, int]) -> int | None:
    """Return the id of a special token by its name in tokenizer_config.json, or else by its number in config.json.

    config.json may have a list of numbers, of which the first counts.
    """
    name = name.get("content") if isinstance(name, Mapping) else name
    if isinstance(name, str) and name in vocabulary:
        return vocabulary[name]
    number = number[0] if isinstance(number, list) and number else number
    return number if type(number) is int and number >= 0 else None


def _adds(
    name: str, tokenizer: Mapping[str, Any], settings: Mapping[str, Any], tokens: list[str], number: int | None
) -> bool:
    """Whether encoding puts the token before (bos) or after (eos) a text."""
    if isinstance(settings.get(f"add_{name}_token"), bool):
        return bool(settings[f"add_{name}_token"])
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors", (processor,)):
        if step.get("type") == "TemplateProcessing" and step.get("single") and number is not None:
            part = step["single"][0 if name == "bos" else -1]
            return bool(part.get("SpecialToken", {}).get("id") == tokens[number])
    return False


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
        yield f"cls_token {_content(settings['cls_token'])!r}"
    renamed = [name for name in templates if re.search("[^A-Za-z0-9_]", name)]
    if renamed:
        yield f"names of chat templates: {', '.join(renamed)} get _ for what is no letter or digit"


def _content(token: Any) -> Any:
    """Return the text of a token, which may be given with its flags."""
    return token.get("content") if isinstance(token, Mapping) else token
