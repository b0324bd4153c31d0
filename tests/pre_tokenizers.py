"""Real vocabularies held against the names that llama.cpp gives to pre-tokenizers: python -m tests.pre_tokenizers

    python -m tests.pre_tokenizers                     write tests/goldens/pre_tokenizers.json
    python -m tests.pre_tokenizers --check             print differences, and exit with 1 if there are any
    python -m tests.pre_tokenizers --llama-cpp FOLDER  an unpacked llama.cpp, instead of tests/converter.py's pinned one

llama.cpp ships vocabularies (models/ggml-vocab-*.gguf), each with the name of its pre-tokenizer, but not with the parts
of the published tokenizer.json, which are written here. A tokenizer is made of both and asked for the text of the
converter's `get_vocab_base_pre`. If the hash is one that this function knows, the parts are those of the published
tokenizer; its name must be the file's. The golden keeps the parts, so that a test can ask us for the name without the
vocabularies (10 MB).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.converter import VERSION, fetched
from tests.gguf_goldens import Reader, dump

CONTROL, USER_DEFINED = 3, 4  # token types
CLS, SEP = 101, 102  # of BERT
GOLDEN = Path(__file__).resolve().parent / "goldens" / "pre_tokenizers.json"
CONTRACTIONS, END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{END}"
QWEN35 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{END}"
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
# DeepSeek LLM's: letters of alphabets that have two cases
LETTERS = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79"
    "-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-"
    "\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-"
    "\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-"
    "\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-"
    "\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)


def byte_level(*, splits: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": splits}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def digits(*, individual: bool) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": individual}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def deepseek(letters: str, punctuation: str, *, at_end: bool) -> dict[str, Any]:
    ends = [split(r"\s+$")] if at_end else []
    return sequence(split("[\r\n]"), split(letters), split(punctuation), *ends, split(HAN), digits(individual=True),
                    byte_level(splits=False))  # fmt: skip


def bpe_parts() -> dict[str, dict[str, Any]]:
    """Return the parts of each published tokenizer.json; `adds` is the token that it puts before a text."""
    nfc, numbers = {"type": "NFC"}, sequence(digits(individual=True), byte_level())
    falcon = sequence({"type": "Punctuation", "behavior": "Contiguous"}, byte_level(), digits(individual=False),
                      split("[0-9][0-9][0-9]"))  # fmt: skip
    return {
        "aquila": {"pre_tokenizer": byte_level()},
        "command-r": {"normalizer": nfc, "pre_tokenizer": numbers, "adds": "bos"},
        "deepseek-coder": {"pre_tokenizer": deepseek("\\s?\\p{L}+", "\\s?\\p{P}+", at_end=False), "adds": "bos"},
        "deepseek-llm": {"pre_tokenizer": deepseek(LETTERS, PUNCTUATION, at_end=True), "adds": "bos"},
        "falcon": {"pre_tokenizer": falcon},
        "gpt-2": {"pre_tokenizer": byte_level()},
        "gpt-neox": {"normalizer": nfc, "pre_tokenizer": byte_level()},
        "llama-bpe": {"pre_tokenizer": sequence(split(LLAMA3), byte_level(splits=False)), "ignore_merges": True,
                      "adds": "bos"},
        "mpt": {"normalizer": nfc, "pre_tokenizer": byte_level()},
        "qwen2": {"normalizer": nfc,
                  "pre_tokenizer": sequence(split(LLAMA3.replace("{1,3}", "")), byte_level(splits=False))},
        "qwen35": {"normalizer": nfc, "pre_tokenizer": sequence(split(QWEN35), byte_level(splits=False))},
        "refact": {"pre_tokenizer": numbers},
        "starcoder": {"pre_tokenizer": numbers},
    }  # fmt: skip


def bpe_document(metadata: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, "special": kind == CONTROL, **flags}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": parts.get("ignore_merges", False), "vocab": {t: number for number, t in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
    }  # fmt: skip
    return {
        "version": "1.0", "added_tokens": added, "normalizer": parts.get("normalizer"),
        "pre_tokenizer": parts["pre_tokenizer"], "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip


def wordpiece_document(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of BERT's WordPiece, whose tokens a GGUF has with ▁ before words and without ##."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    texts = [
        token if kind == CONTROL else token[1:] if token.startswith("\u2581") else f"##{token}"
        for token, kind in zip(tokens, types, strict=True)
    ]
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": {text: number for number, text in enumerate(texts)}}  # fmt: skip
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                  "lowercase": True}  # fmt: skip
    return {
        "version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip


class Encoder:
    """What the converter asks of a tokenizer, with the hash that it makes of the answer."""

    def __init__(self, document: dict[str, Any], before: list[int], after: list[int]) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(json.dumps(document))
        self.before, self.after, self.hash = before, after, ""

    def encode(self, text: str) -> list[int]:
        ids = [*self.before, *self.tokenizer.encode(text, add_special_tokens=False).ids, *self.after]
        self.hash = hashlib.sha256(str(ids).encode()).hexdigest()
        return ids


def names(root: Path) -> dict[str, dict[str, Any]]:
    """Return by vocabulary: the file's name, the converter's, its hash, and the parts that it was made with."""
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    import conversion.base

    logging.disable(logging.WARNING)
    parts, made = bpe_parts(), {}
    for path in sorted((root / "models").glob("ggml-vocab-*.gguf")):
        name = path.stem.removeprefix("ggml-vocab-")
        _, entries = Reader(path.read_bytes(), math.inf).head()
        metadata = {key: entry[-1] for key, entry in entries.items()}
        kind = metadata["tokenizer.ggml.model"]
        found = {"model": kind, "file": metadata.get("tokenizer.ggml.pre")}
        if kind in ("gpt2", "bert"):
            known = parts[name] if kind == "gpt2" else {}
            before = [metadata["tokenizer.ggml.bos_token_id"]] if known.get("adds") else []
            encoder = (
                Encoder(bpe_document(metadata, known), before, [])
                if kind == "gpt2"
                else Encoder(wordpiece_document(metadata), [CLS], [SEP])
            )
            try:
                found["converter"] = conversion.base.TextModel.get_vocab_base_pre(None, encoder)
            except NotImplementedError:
                found["converter"] = None  # its table has no such hash
            found |= {"hash": encoder.hash, "parts": {k: v for k, v in known.items() if k != "adds"}}
        made[name] = found
    return made


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--llama-cpp", type=Path)
    chosen = parser.parse_args(arguments)
    root = (chosen.llama_cpp or fetched()).resolve()
    document = dump({"made by": {"llama-cpp-python": VERSION}, "names": names(root)})
    if not chosen.check:
        GOLDEN.parent.mkdir(parents=True, exist_ok=True)
        GOLDEN.write_text(document)
        return 0
    same = GOLDEN.exists() and GOLDEN.read_text() == document
    print("as the golden" if same else f"{GOLDEN.name} differs; run without --check, and read the difference")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
