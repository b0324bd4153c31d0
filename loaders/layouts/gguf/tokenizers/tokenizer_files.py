"""A GGUF's tokenizer as transformers' files: tokenizer.json and tokenizer_config.json, from tokenizer.ggml.*.

Files are made for SentencePiece's BPE, and for byte-level BPE if llama.cpp's name of its pre-tokenizer is known here.
They tokenize text as llama.cpp does, which is as the tokenizer from which the GGUF was made. There is one difference:
transformers 5's LlamaTokenizer puts no space before a text that begins with one, while llama.cpp, Llama 2's
tokenizer.json and SentencePiece do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers import gguf
from loaders.layouts.gguf.tokenizers.chat_templates import template_setting
from loaders.layouts.gguf.tokenizers.pre_tokenizers import IGNORES_MERGES, form_named, pre_tokenizers
from loaders.layouts.gguf.tokenizers.sentencepiece import SPACE
from loaders.layouts.gguf.tokenizers.sentencepiece_model import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from loaders.layouts.gguf.tokenizers.special_tokens import KEYS, ROLES
from loaders.limits import TOKEN

# other names under which llama.cpp splits text in the same way (src/llama-vocab.cpp)
SAME = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "midm-2.0", "lfm2", "jina-v5-nano", "smaug-bpe",
                     "chatglm-bpe", "glm5"), "llama-bpe"),
    **dict.fromkeys(("kormo", "f2llmv2", "megrez", "hunyuan", "stablelm2", "solar-open", "grok-2", "bailingmoe",
                     "bailingmoe2", "llada-moe"), "qwen2"),
    **dict.fromkeys(("kanana2", "talkie", "minimax-m2"), "gpt-4o"),
    **dict.fromkeys(("joyai-llm", "hy_v4"), "deepseek-v3"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), "smollm"),
    **dict.fromkeys(("phi-2", "gigachat", "a.x-4.0", "mellum", "modern-bert", "mpt", "olmo", "jais", "trillion",
                     "granite-docling", "exaone4", "roberta-bpe"), "gpt-2"),
}  # fmt: skip
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
NORMALIZED = ("qwen2", "qwen35")  # Qwen's own tokenizers compose characters (NFC) first


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the files by name; none if the vocabulary is of another kind, or the folder has a tokenizer already."""
    if checkpoint.container != "gguf" or set(TOKENIZERS) & set(checkpoint.aux):
        return {}
    metadata = gguf.plain(gguf.read_metadata(checkpoint.source, checkpoint.files[0].name))
    try:
        tokenizer = tokenizer_of(metadata)
        if tokenizer is None:
            return {}
        made = {"tokenizer.json": tokenizer, "tokenizer_config.json": _settings(metadata)}
        return {name: json.dumps(each, ensure_ascii=False, indent=1).encode() + b"\n" for name, each in made.items()}
    # Lists of different lengths, ids of no token, bytes that are no characters: the weights can be converted all the
    # same, so that a damaged tokenizer only means that there is none.
    except (KeyError, IndexError, TypeError, ValueError):
        return {}


def tokenizer_of(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the document of tokenizer.json, or None for a vocabulary of another kind."""
    kind, pre = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre"))
    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    types = metadata.get("tokenizer.ggml.token_type") or (NORMAL,) * len(tokens)
    vocabulary = {
        token: number
        for number, (token, each) in enumerate(zip(tokens, types, strict=True))
        if each != UNUSED or token != f"[PAD{number}]"
    }
    if kind == "gpt2":
        parts = _byte_level(pre, metadata, vocabulary)
    elif kind == "llama":
        parts = _sentencepiece(metadata, vocabulary, types)
    else:
        return None
    if parts is None:
        return None
    added = [
        {
            "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": types[number] != USER_DEFINED,
        }
        for token, number in vocabulary.items()
        if types[number] in (CONTROL, UNKNOWN, USER_DEFINED)
    ]  # fmt: skip
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return head | {"post_processor": _processor(metadata, tokens)} | parts


def _byte_level(pre: str, metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any] | None:
    """Return the parts of a byte-level BPE, or None for a pre-tokenizer that is unknown here."""
    form = form_named(SAME.get(pre, pre))
    if form is None or pre == "kimi-k2":  # Kimi's expression is not one of the tokenizers library
        return None
    steps = pre_tokenizers(form)
    return {
        "normalizer": {"type": "NFC"} if pre in NORMALIZED else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre in IGNORES_MERGES, "vocab": dict(vocabulary),
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: Mapping[str, int], types: Sequence[int]) -> dict[str, Any]:
    """Return the parts of a SentencePiece BPE."""
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])]
    unknown = metadata["tokenizer.ggml.tokens"][metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]} if prefix else spaces,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": dict(vocabulary), "merges": _merges(vocabulary, types, metadata["tokenizer.ggml.scores"]),
        },
    }  # fmt: skip


def _merges(vocabulary: Mapping[str, int], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return all ways to make a token of two others, the greatest score first: SentencePiece's order."""
    found = []
    for token, number in vocabulary.items():
        if types[number] != NORMAL or len(token) > TOKEN:
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[number], number, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _processor(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any] | None:
    """Return the step that puts tokens before and after a text, or None. The defaults are llama.cpp's."""
    is_llama = metadata["tokenizer.ggml.model"] == "llama"
    adds = {"bos": metadata.get("tokenizer.ggml.add_bos_token", is_llama),
            "eos": metadata.get("tokenizer.ggml.add_eos_token", False)}  # fmt: skip
    usual = {"bos": 1, "eos": 2} if is_llama else {}
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id", usual.get(name)) for name in adds}
    names = {name: tokens[number] for name, number in ids.items() if adds[name] and number is not None}
    if not names:
        return None

    def around(letter: str, kind: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": letter, "type_id": kind}}]
        if "bos" in names:
            parts.insert(0, {"SpecialToken": {"id": names["bos"], "type_id": kind}})
        if "eos" in names:
            parts.append({"SpecialToken": {"id": names["eos"], "type_id": kind}})
        return parts

    special = {token: {"id": token, "ids": [ids[name]], "tokens": [token]} for name, token in sorted(names.items())}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": special,
    }


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of tokenizer_config.json."""
    tokens = metadata["tokenizer.ggml.tokens"]
    found: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for role, key in KEYS.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and role in ROLES:
            found[f"{role}_token"] = tokens[number]
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    found |= {} if length is None else {"model_max_length": length}
    template = template_setting(metadata)
    found |= {} if template is None else {"chat_template": template}
    return found | {"tokenizer_class": "PreTrainedTokenizerFast"}
