"""tekken.json, Mistral's own file of a byte-level BPE, as the document that tokenizer.json would be.

Special tokens have the first ids, then come the tokens by rank. The file has no merges: two tokens make a third if all
three have a rank, the third's deciding, as mistral-common and llama.cpp's converter have it (gguf-py, vocab.py:
extract_vocab_merges_from_model).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from loaders.errors import BadCheckpoint
from loaders.layouts.gguf.tokenizers.byte_letters import byte_letters
from loaders.storage.base import PinnedFiles
from loaders.storage.json_files import read_json

FILE = "tekken.json"
LONGEST = 1 << 10  # bytes of a token: a longer one would take as many tries as it has places to be cut
MOST = 1 << 22  # tokens: the largest published vocabularies have some 260,000
# the special tokens of files that do not list them, of version v3 and older (tekken.py: DEPRECATED_SPECIAL_TOKENS)
OLDER = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
SETTINGS = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True,
    "add_eos_token": False,
}  # fmt: skip


def read_tekken(files: PinnedFiles) -> dict[str, Any]:
    """Read tekken.json as tokenizer.json's document.

    Raises:
        BadCheckpoint: it is not as mistral-common writes it.
    """
    found = read_json(files, FILE)
    try:
        return _document(found)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise BadCheckpoint(f"{FILE}: not as mistral-common writes it ({type(error).__name__}: {error})") from None


def _document(found: Mapping[str, Any]) -> dict[str, Any]:
    config, specials = found["config"], found.get("special_tokens")
    first, count = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
    if not 0 <= first <= count <= MOST:
        raise ValueError(f"{count} tokens, of which {first} are special")
    names = dict(enumerate(OLDER)) if specials is None else {int(s["rank"]): str(s["token_str"]) for s in specials}
    added = [
        {"id": number, "content": names.get(number, f"<SPECIAL_{number}>"), "special": True} for number in range(first)
    ]
    letters = byte_letters()
    ranks = {
        base64.b64decode(each["token_bytes"], validate=True): int(each["rank"])
        for each in found["vocab"]
        if int(each["rank"]) < count - first
    }
    if any(len(token) > LONGEST for token in ranks):
        raise ValueError(f"a token of more than {LONGEST} bytes")
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    steps = [
        {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    return {
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {
            "type": "BPE", "vocab": {text[token]: first + rank for token, rank in ranks.items()},
            "merges": [[text[left], text[right]] for left, right in merges_of(ranks)],
        },
    }  # fmt: skip


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return all ways to make a token of two others, in the order in which they are to be tried."""
    found = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        found += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found
