"""tiktoken's files of a byte-level BPE as tokenizer.json's document: Kimi's, Hunyuan's, and the first Qwen's.

A line has a token in base64 and its rank. Neither the way of cutting text nor the special tokens are in the file: both
are in the Python of the model, which is not run. So they are written down here for the files that are known.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.layouts.gguf.tokenizers.byte_letters import byte_letters
from loaders.layouts.gguf.tokenizers.pre_tokenizers import form_named, pre_tokenizers
from loaders.layouts.gguf.tokenizers.tekken import LONGEST, MOST
from loaders.storage.base import PinnedFiles

LARGEST = 1 << 27  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiktoken:
    """A file whose tokenizer is known.

    `pre` is llama.cpp's name of its way of cutting text, and `way` another name of that. Special tokens follow those of
    the file: `named` first, then as many of `reserved` (with {} for a number, the id if `by_id`) as make `specials`.
    """

    file: str
    pre: str
    way: str = ""
    named: tuple[str, ...] = ()
    reserved: str = ""
    by_id: bool = False
    specials: int = 0


KNOWN = (
    # tokenization_kimi.py: 256 ids beyond the file, named in tokenizer_config.json or reserved
    Tiktoken(file="tiktoken.model", pre="kimi-k2", reserved="<|reserved_token_{}|>", by_id=True, specials=256),
    # tokenization_qwen.py
    Tiktoken(
        file="qwen.tiktoken", pre="qwen2", named=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        reserved="<|extra_{}|>", specials=208,
    ),
    # tokenization_hy.py
    Tiktoken(
        file="hy.tiktoken", pre="hunyuan", way="qwen2",
        named=("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"), reserved="<|extra_{}|>",
        specials=210,
    ),
)  # fmt: skip


def find(files: PinnedFiles) -> Tiktoken | None:
    """Return the known file that a checkpoint has, or None."""
    return next((each for each in KNOWN if files.find(each.file) is not None), None)


def read_tiktoken(
    files: PinnedFiles, known: Tiktoken, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Read the file as tokenizer.json's document; return it and the settings that go with it.

    Raises:
        BadCheckpoint: it is not as tiktoken writes it.
    """
    ranks = _ranks(files.read_all(known.file, LARGEST), known.file)
    letters, first = byte_letters(), len(ranks)
    if sorted(ranks.values()) != list(range(first)):
        raise BadCheckpoint(f"{known.file}: expected the ranks 0 to {first - 1}, each once; fetch it again")
    shown = {token: "".join(letters[byte] for byte in token) for token in ranks}
    decoder = settings.get("added_tokens_decoder") or {}
    told = {int(number): each["content"] for number, each in decoder.items()}
    added = []
    for place in range(known.specials):
        number, after = first + place, place - len(known.named)
        usual = known.named[place] if after < 0 else known.reserved.format(number if known.by_id else after)
        added.append({"id": number, "content": told.get(number, usual), "special": True, "normalized": False})
    form = form_named(known.way or known.pre)
    assert form is not None
    document = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers(form)},
        "model": {
            "type": "BPE", "vocab": {shown[token]: rank for token, rank in ranks.items()},
            "merges": [[shown[left], shown[right]] for left, right in _merges(ranks)],
        },
    }  # fmt: skip
    return document, {"tokenizer_class": "PreTrainedTokenizer", **settings}


def _ranks(raw: bytes, name: str) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            found[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise BadCheckpoint(f"{name}, line {number}: expected a token in base64 and its rank") from None
    if not found or len(found) > MOST or any(len(token) > LONGEST for token in found):
        raise BadCheckpoint(f"{name}: {len(found)} tokens, or one of more than {LONGEST} bytes; not as tiktoken has it")
    return found


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the last merge that makes each token, as the converter finds it (QwenModel.bpe in conversion/qwen.py)."""
    for token, rank in ranks.items():
        parts = [token[at : at + 1] for at in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            least = min(pairs)
            if least >= rank:
                break
            at = pairs.index(least)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
