"""Inputs of the readers of tokenizers: SentencePiece's file and tokenizer.json, which become GGUF's metadata."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from loaders.layouts.gguf.tokenizers.tokenizer import tokenizer_metadata
from loaders.storage.base import PinnedFiles
from loaders.storage.folder import Folder
from tests.fuzz.cases import Case, Reader
from tests.fuzz.mutations import Draw, chance, damaged, json_texts, values

ROWS = 96


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def model() -> bytes:
    """A SentencePiece model: its pieces (text, score, type), the trainer's and the normalizer's settings."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces += [(f"<0x{i:02X}>", 6) for i in range(16)] + [(f"t{i}", 1) for i in range(60)]
    out = b""
    for at, (text, kind) in enumerate(pieces):
        score = b"\x15" + struct.pack("<f", -float(at))
        out += field(1, field(1, text.encode()) + score + varint(3 << 3) + varint(kind))
    return out + field(2, varint(3 << 3) + varint(2)) + field(3, varint(3 << 3) + varint(1))


SETTINGS = {
    "bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": "x",
    "tokenizer_class": "LlamaTokenizer",
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}, "92": {"content": "<x>", "special": False}},
}  # fmt: skip


@st.composite
def words(draw: Draw) -> tuple[str, ...]:
    """The rows of the embedding, and config.json's token that begins a text."""
    rows = draw(st.sampled_from((ROWS, ROWS, 32016, 10)))
    return str(rows), json.dumps(draw(values()) if chance(draw, 3) else 1)


@st.composite
def sentencepiece_cases(draw: Draw) -> Case:
    files = {"tokenizer.model": model() if chance(draw, 5) else draw(damaged(model()))}
    if chance(draw, 3):
        files["added_tokens.json"] = draw(json_texts({"<a>": 90, "<b>": 91}))
    files["tokenizer_config.json"] = draw(json_texts(SETTINGS)) if chance(draw, 3) else json.dumps(SETTINGS).encode()
    return Case(files=files, words=draw(words()))


BOS = {"id": 0, "content": "<|bos|>", "special": True}
BPE = {
    "version": "1.0", "added_tokens": [BOS], "normalizer": None,
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    },
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "model": {
        "type": "BPE", "vocab": {f"t{i}": i for i in range(1, 90)} | {"a": 90, "b": 91, "ab": 92},
        "merges": ["a b", ["a", "b"]],
    },
}  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
FORMS: tuple[dict[str, Any], ...] = (
    BPE,
    {
        **BPE,
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]},
        "pre_tokenizer": None,
        "model": {**BPE["model"], "byte_fallback": True},
    },
    {**BPE, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BPE["pre_tokenizer"]]}},
    {
        **BPE,
        "normalizer": {"type": "BertNormalizer", "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1, "##b": 2}, "unk_token": "[UNK]"},
    },
    {
        **BPE,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        "model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0], ["▁b", -2.0]], "unk_id": 0},
    },
)
TOKENIZER_KEYS = ("normalizer", "pre_tokenizer", "post_processor", "model", "added_tokens")


@st.composite
def tokenizer_cases(draw: Draw) -> Case:
    document = draw(st.sampled_from(FORMS))
    files = {"tokenizer.json": draw(json_texts(document, TOKENIZER_KEYS))}
    files["tokenizer_config.json"] = draw(json_texts(SETTINGS)) if chance(draw, 3) else json.dumps(SETTINGS).encode()
    if chance(draw, 4):
        files["generation_config.json"] = draw(json_texts({"eos_token_id": [2], "bos_token_id": 1, "temperature": 0.5}))
    return Case(files=files, words=draw(words()))


def read(folder: Path, given: tuple[str, ...]) -> None:
    rows, bos = given
    store = Folder(folder)
    files = PinnedFiles(store, store.list())
    tokenizer_metadata(files, {"model_type": "llama", "bos_token_id": json.loads(bos), "eos_token_id": [2]}, int(rows))


READERS = {
    "sentencepiece": Reader(sentencepiece_cases(), read, 100),
    "tokenizer": Reader(tokenizer_cases(), read, 100),
}
