"""Vocabularies of other kinds than BPE with a tokenizer.json, and what model types have of their own."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from loaders.containers import gguf
from loaders.errors import BadCheckpoint, BadSpec
from loaders.layouts.gguf.tokenizers.special_tokens import read_special
from loaders.layouts.gguf.tokenizers.tokenizer import tokenizer_metadata
from tests import tiny_tokenizers
from tests.reading import files_of

ROWS = tiny_tokenizers.ROWS
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


def found_in(folder: Path, rows: int = ROWS, **config: Any) -> dict[str, Any]:
    """Return tokenizer.ggml.* without that beginning."""
    metadata = gguf.plain(tokenizer_metadata(files_of(folder), config, rows)[0])
    return {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}


def changed(folder: Path, **parts: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


# --- tiktoken's files


def ranks(*words: bytes) -> str:
    tokens = [*(bytes([byte]) for byte in range(256)), *words]
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def test_kimis_file_has_names_from_the_settings_and_one_merge_a_token(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text(ranks(b"th", b"the", b"he"))
    decoder = {"259": {"content": "[BOS]", "special": True}, "260": {"content": "[EOS]", "special": True}}
    settings = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = found_in(tmp_path, 259 + 256, model_type="kimi_k2", eos_token_id=260)
    assert (found["model"], found["pre"]) == ("gpt2", "kimi-k2")
    assert found["tokens"][256:262] == ("th", "the", "he", "[BOS]", "[EOS]", "<|reserved_token_261|>")
    assert found["token_type"][258:261] == (1, 3, 3)
    assert found["merges"] == ("t h", "th e", "h e")
    assert (found["bos_token_id"], found["eos_token_id"]) == (259, 260)


def test_the_first_qwens_file_has_tokens_of_its_program(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text(ranks(b"th"))
    found = found_in(tmp_path, 257 + 208, model_type="qwen")
    assert found["tokens"][257:261] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>")
    assert (found["tokens"][-1], found["pre"], found["bos_token_id"]) == ("<|extra_204|>", "qwen2", 257)


def test_hunyuans_file_has_tokens_of_its_program(tmp_path: Path) -> None:
    (tmp_path / "hy.tiktoken").write_text(ranks(b"th"))
    found = found_in(tmp_path, 257 + 210, model_type="hunyuan_v1_moe", pad_token_id=261)
    assert found["tokens"][259:263] == ("<|bos|>", "<|eos|>", "<|pad|>", "<|extra_0|>")
    assert (found["tokens"][-1], found["pre"], found["padding_token_id"]) == ("<|extra_204|>", "hunyuan", 261)


@pytest.mark.parametrize("text", ["IQ== x\n", "IQ== 1\n", "!? 0\n", "\n"])
def test_a_damaged_file_of_tiktoken_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text(text)
    with pytest.raises(BadCheckpoint, match=r"^tiktoken.model"):
        found_in(tmp_path)


# --- encoders


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return bytes([number << 3 | 2, len(value)]) + value
    return (
        bytes([number << 3 | 5]) + struct.pack("<f", value) if isinstance(value, float) else bytes([number << 3, value])
    )


def test_xlm_robertas_own_file_gets_its_special_tokens_in_front(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), (",", -3.5, 1), ("▁a", -4.0, 1)]
    body = b"".join(field(1, field(1, t.encode()) + field(2, s) + field(3, k)) for t, s, k in pieces)
    normalizer = field(2, b"map") + field(3, 1) + field(4, 0)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(body + field(2, field(3, 1)) + field(3, normalizer))
    found = found_in(tmp_path, 8, model_type="xlm-roberta", type_vocab_size=1, pad_token_id=1)
    assert found["tokens"] == ("<s>", "<pad>", "</s>", "<unk>", ",", "▁a", "<mask>", "[PAD7]")
    assert found["token_type"] == (3, 3, 3, 2, 1, 1, 3, 5)
    assert found["scores"][4:6] == (-3.5, -4.0)
    assert (found["model"], found["precompiled_charsmap"]) == ("t5", tuple(b"map"))
    assert (found["add_space_prefix"], found["remove_extra_whitespaces"]) == (True, False)
    assert (found["token_type_count"], found["padding_token_id"]) == (1, 1)


@pytest.mark.parametrize(("kind", "parts", "message"), [
    ("wordpiece", {"normalizer": {"type": "Lowercase"}}, "with BertNormalizer only; its normalizer is Lowercase"),
    ("wordpiece", {"pre_tokenizer": None}, "with BertPreTokenizer only; its pre_tokenizer is None"),
    ("unigram", {"normalizer": {"type": "NFKC"}}, "its normalizer .*NFKC.* has no counterpart"),
    ("unigram", {"pre_tokenizer": {"type": "Digits"}}, "its pre_tokenizer .*Digits.* is none"),
])  # fmt: skip
def test_what_an_encoder_does_otherwise_is_refused(
    kind: str, parts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_tokenizers.write(kind, tmp_path)
    changed(tmp_path, **parts)
    with pytest.raises(BadSpec, match=message):
        found_in(tmp_path)


# --- what model types have of their own


def test_glms_turns_end_with_tokens_that_its_files_do_not_name(tmp_path: Path) -> None:
    tiny_tokenizers.write("bpe", tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    names = ("[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>")
    more = [tiny_tokenizers.added(300 + number, name) for number, name in enumerate(names)]
    changed(tmp_path, added_tokens=document["added_tokens"] + more)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    changed(tmp_path, post_processor=None)
    found = found_in(tmp_path, model_type="glm4_moe")
    ids = {key: found[f"{key}_token_id"] for key in ("bos", "eot", "unknown", "eom", "eos")}
    assert ids == {"bos": 300, "eot": 301, "unknown": 302, "eom": 303, "eos": 289}


def test_internlm2_has_unused_tokens_and_an_end_of_chat(tmp_path: Path) -> None:
    tiny_tokenizers.write("sentencepiece", tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for number, content in (("312", "<|im_end|>"), ("313", "<|looks|>")):
        settings["added_tokens_decoder"][number] = {"content": content, "special": content == "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = found_in(tmp_path, model_type="internlm2")
    assert (found["eos_token_id"], found["token_type"][312:314]) == (312, (3, 4))  # as told, not by its looks
    assert found["add_space_prefix"] is True
    assert found_in(tmp_path, model_type="llama")["token_type"][313] == 3


# --- tokens around a text


def template(*parts: Any, pair: list[Any] | None = None) -> dict[str, Any]:
    steps = [{"SpecialToken": {"id": part, "type_id": 0}} if isinstance(part, str) else part for part in parts]
    return {"post_processor": {"type": "TemplateProcessing", "single": steps, "pair": pair or []}}


def test_a_template_says_what_is_put_around_a_text() -> None:
    special = read_special(template("<s>", SEQUENCE, "</s>"), {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    assert special.adds == {"bos": True, "eos": True}
    special = read_special(template(SEQUENCE, "<|endoftext|>"), {"eos_token": "<|im_end|>"})
    assert (special.names["eos"], special.names["eot"], special.adds) == ("<|endoftext|>", "<|im_end|>", {"eos": True})
    special = read_special(template("[CLS]", SEQUENCE), {"cls_token": "[CLS]"})
    assert (special.names["bos"], special.adds) == ("[CLS]", {"bos": True})


def test_settings_count_where_the_class_heeds_them() -> None:
    byte_level = {"post_processor": {"type": "ByteLevel"}}
    heeded = {"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}
    assert read_special(byte_level, heeded).adds == {"bos": True, "eos": False}
    generic = {**heeded, "tokenizer_class": "PreTrainedTokenizerFast"}
    assert read_special(byte_level, generic).adds == {"bos": False, "eos": False}
    assert read_special({}, generic).adds == {"bos": True}
