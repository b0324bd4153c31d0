"""tokenizer.model: what is read of it, and files that are not to be trusted."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from loaders.errors import BadCheckpoint
from loaders.layouts.gguf.tokenizers.sentencepiece import from_json, is_sentencepiece
from loaders.layouts.gguf.tokenizers.sentencepiece_model import BPE, BYTE, NORMAL, Token, read_model
from tests.reading import files_of


def field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


def piece(text: str, score: float, kind: int | None = None) -> bytes:
    tail = b"" if kind is None else bytes([3 << 3, kind])
    return field(1, field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + tail)


# two pieces; BPE; a dummy prefix that is not wanted; a field of eight bytes and an unknown one
HONEST = (
    piece("▁a", -1.5) + piece("<0x0A>", 0, BYTE) + field(2, bytes([3 << 3, BPE])) + field(3, bytes([3 << 3, 0]))
    + bytes([9 << 3 | 1]) + bytes(8) + field(10, b"later")
)  # fmt: skip


def test_pieces_scores_types_and_settings_are_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(HONEST)
    found = read_model(files_of(tmp_path), "tokenizer.model")
    assert found.pieces == (Token("▁a", -1.5, NORMAL), Token("<0x0A>", 0.0, BYTE))
    assert (found.model_type, found.adds_prefix) == (BPE, False)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "holds no pieces"),
        (HONEST[:5], "announced|ends within"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "announced where 0 are left"),
        (b"\x0a" + b"\xff" * 12, "more than 10 bytes"),
        (b"\x0b", "wire type 3"),
        (b"\x15\x00", "damaged"),
        (piece("a", 0, 9), "unknown type 9"),
        (field(1, field(1, b"\xff")), "damaged"),
        (b"IQ== 0\nIg== 1\n", "not a model of SentencePiece"),  # tiktoken's, under the same name
    ],
)
def test_what_is_none_is_refused(raw: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(BadCheckpoint, match=f"tokenizer.model: .*({what})"):
        read_model(files_of(tmp_path), "tokenizer.model")


def test_no_single_wrong_byte_does_more_than_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for place in range(len(HONEST)):
        for value in (0, 0x7F, 0xFF):
            path.write_bytes(HONEST[:place] + bytes([value]) + HONEST[place + 1 :])
            try:
                assert len(read_model(files_of(path.parent), path.name).pieces) <= 3
            except BadCheckpoint:
                continue


def test_scores_follow_the_order_of_merges() -> None:
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "ab": 2, "abc": 3, "a": 4, "b": 5, "c": 6}
    tokenizer = {
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocabulary, "merges": ["a b", ["ab", "c"]]},
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    }
    assert is_sentencepiece(tokenizer)
    found = from_json(tokenizer, {}, 8)
    assert found.tokens == [*vocabulary, "[PAD7]"]
    assert found.scores == [0, 0, 0, -1, -2, -3, -4, -10000]
    assert found.types == [3, 6, 1, 1, 1, 1, 1, 5]
    assert found.adds_prefix is False
