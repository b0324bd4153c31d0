"""Tokenizers of 320 tokens for tiny checkpoints: real ones, which cut any text, made without training.

"bpe" is byte-level, as most models have it; "bpe_spaces" a BPE over text with ▁ for spaces and bytes for what it lacks,
as Gemma 4's; "sentencepiece" a tokenizer.model alone, as Llama 2's; "bpe_roberta" byte-level with an encoder's special
tokens; "wordpiece" BERT's; "unigram" XLM-RoBERTa's.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.tiny_configs import ROWS

# Numbers of special tokens by kind; "other" is for tokens that stand for images and the like.
IDS: dict[str, dict[str, int]] = {
    "bpe": {"bos": 288, "eos": 289, "pad": 290, "other": 291},
    "bpe_spaces": {"pad": 0, "eos": 1, "bos": 2, "other": 4},
    "sentencepiece": {"bos": 1, "eos": 2, "pad": 0, "other": 5},
    "bpe_roberta": {"bos": 0, "pad": 1, "eos": 2, "cls": 0, "sep": 2, "other": 3},
    "wordpiece": {"pad": 0, "bos": 2, "eos": 3, "cls": 2, "sep": 3, "other": 1},
    "unigram": {"bos": 0, "pad": 1, "eos": 2, "cls": 0, "sep": 2, "other": 3},
}
PAIRS = (
    " t", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed", "is", "it", "al",
    "ar", "st", "to", "nt", "ng", "se", "ha", "as", "ou", "io", "le", "ve", "co",
)  # fmt: skip
CHARACTERS = "etaoinshrdlcumwfgypbvk,.0123456789xjqzTAI"
TEMPLATE = "{% for message in messages %}<|begin|>{{ message['content'] }}<|end|>{% endfor %}"


def byte_letters() -> list[str]:
    """Return the letter that a byte-level tokenizer writes for each byte (GPT-2's bytes_to_unicode)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def added(number: int, content: str, *, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": number, "content": content, **flags}


def template(first: tuple[str, int] | None, last: tuple[str, int] | None) -> dict[str, Any]:
    """Return the post-processor that puts a token before and another after a text."""

    def special(token: tuple[str, int] | None) -> list[Any]:
        return [{"SpecialToken": {"id": token[0], "type_id": 0}}] if token else []

    single = [*special(first), {"Sequence": {"id": "A", "type_id": 0}}, *special(last)]
    tokens = {t[0]: {"id": t[0], "ids": [t[1]], "tokens": [t[0]]} for t in (first, last) if t}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, *special(last)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def bpe_model(tokens: Sequence[str], merges: Sequence[str], **settings: Any) -> dict[str, Any]:
    usual = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    vocab = {token: number for number, token in enumerate(tokens)}
    return {"type": "BPE", **usual, **settings, "vocab": vocab, "merges": [list(merge) for merge in merges]}


def byte_level(*, splits: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": splits}


def document(tokens: list[dict[str, Any]], model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens}
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        made[part] = parts.get(part)
    return {**made, "model": model}


def bpe(folder: Path) -> dict[str, Any]:
    pairs = [pair.replace(" ", "Ġ") for pair in PAIRS]
    specials = [added(288, "<|begin|>"), added(289, "<|end|>"), added(290, "<|pad|>"),
                added(291, "<tool>", special=False)]  # fmt: skip
    whole = document(
        specials, bpe_model([*byte_letters(), *pairs], pairs), pre_tokenizer=byte_level(), decoder=byte_level(),
        post_processor=template(("<|begin|>", 288), None),
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1))
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>",
            "pad_token": "<|pad|>", "add_bos_token": True, "add_eos_token": False}  # fmt: skip


def bpe_spaces(folder: Path) -> dict[str, Any]:
    specials = [added(n, token) for n, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<|image|>"))]
    pairs = [pair.replace(" ", "▁") for pair in PAIRS]
    tokens = [token["content"] for token in specials] + [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({*"▁", *"".join(pairs), *CHARACTERS})
    tokens = [*tokens, *letters, *pairs][:ROWS]
    kept = [pair for pair in pairs if pair in tokens]
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    whole = document(
        specials, bpe_model(tokens, kept, unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        decoder={"type": "Sequence", "decoders": steps}, post_processor=template(("<bos>", 2), None),
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1))
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
            "pad_token": "<pad>", "unk_token": "<unk>"}  # fmt: skip


def sentencepiece(folder: Path) -> dict[str, Any]:
    """Write tokenizer.model, a protobuf of sentencepiece's ModelProto (src/sentencepiece_model.proto)."""

    def varint(value: int) -> bytes:
        low, rest = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    def block(field: int, data: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(data)) + data

    normal, unknown, control, byte = 1, 2, 3, 6
    pieces: list[tuple[str, float, int]] = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control)]
    pieces += [(f"<0x{each:02X}>", 0.0, byte) for each in range(256)]
    texts = [pair.replace(" ", "▁") for pair in PAIRS[:20]] + ["▁", *CHARACTERS[:40]]
    pieces += [(text, -float(rank), normal) for rank, text in enumerate(texts)]
    data = b"".join(
        block(1, block(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind))
        for text, score, kind in pieces
    )
    trainer = number(3, 2) + number(4, len(pieces)) + number(35, 1) + number(40, 0) + number(41, 1) + number(42, 2)
    normalizer = block(1, b"identity") + number(3, 1) + number(4, 0) + number(5, 1)
    (folder / "tokenizer.model").write_bytes(data + block(2, trainer) + block(3, normalizer))
    decoder = {str(n): {**added(n, text), "id": None} for n, text in enumerate(("<unk>", "<s>", "</s>"))}
    for each in decoder.values():
        del each["id"]
    return {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": decoder}  # fmt: skip


def bpe_roberta(folder: Path) -> dict[str, Any]:
    names = ("<s>", "<pad>", "</s>", "<unk>")
    pairs = [pair.replace(" ", "Ġ") for pair in PAIRS]
    tokens = [*names, *byte_letters(), *pairs, "<mask>"]
    specials = [added(n, token) for n, token in enumerate(names)] + [added(292, "<mask>")]
    whole = document(
        specials, bpe_model(tokens, pairs), pre_tokenizer=byte_level(), decoder=byte_level(),
        post_processor={"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True,
                        "add_prefix_space": False},
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1))
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>",
            "mask_token": "<mask>"}  # fmt: skip


def wordpiece(folder: Path) -> dict[str, Any]:
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'"]
    words = [pair for pair in PAIRS if pair != " t"]
    tokens = [*names, *letters, *(f"##{letter}" for letter in letters), *words, *(f"##{word}" for word in words)]
    whole = document(
        [added(n, token) for n, token in enumerate(names)],
        {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100, "vocab": {token: number for number, token in enumerate(tokens)}},
        normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                    "strip_accents": None, "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        post_processor=template(("[CLS]", 2), ("[SEP]", 3)),
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1))
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "unk_token": "[UNK]", "sep_token": "[SEP]",
            "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}  # fmt: skip


def unigram(folder: Path) -> dict[str, Any]:
    names = ("<s>", "<pad>", "</s>", "<unk>")
    texts = ["▁", *CHARACTERS, *(pair.replace(" ", "▁") for pair in PAIRS)]
    vocab = [[name, 0.0] for name in names] + [[text, -2.0 - rank / 8] for rank, text in enumerate(texts)]
    vocab += [[f"▁{first}{second}", -20.0] for first in CHARACTERS[:16] for second in CHARACTERS[:16]]
    vocab = [*vocab[: ROWS - 1], ["<mask>", 0.0]]
    # sentencepiece's Precompiled map: the size of a trie, here of one empty unit, the trie, and no replacements
    charsmap = base64.b64encode(struct.pack("<I", 1024) + bytes(1024) + b"\0").decode()
    whole = document(
        [*(added(n, token) for n, token in enumerate(names)), {**added(ROWS - 1, "<mask>"), "lstrip": True}],
        {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": False},
        normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap},
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        post_processor=template(("<s>", 0), ("</s>", 2)),
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False, indent=1))
    return {"tokenizer_class": "XLMRobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
            "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}  # fmt: skip


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    each.__name__: each for each in (bpe, bpe_spaces, sentencepiece, bpe_roberta, wordpiece, unigram)
}


def write(kind: str, folder: Path) -> None:
    """Write the tokenizer's files, and a chat template where the kind is a language model's."""
    settings = KINDS[kind](folder) | {"clean_up_tokenization_spaces": False, "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=1))
    if kind in ("bpe", "bpe_spaces", "sentencepiece"):
        (folder / "chat_template.jinja").write_text(TEMPLATE)
