"""The tokens that transformers adds to a tokenizer.json when it loads it, because other files name them.

Each takes the next free id, whatever id the files say: add_tokens of the tokenizers library counts on from the largest.
The order is that of transformers 5.23 (tokenization_utils_tokenizers.py): added_tokens_decoder by id, or else
added_tokens.json, then the tokens with a role, then additional ones. Tokens that are built into a class of transformers
are not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loaders.storage.base import PinnedFiles
from loaders.storage.json_files import read_json

ADDED_FILE = "added_tokens.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is not in tokenizer.json: its id, its text, and whether it is special."""

    id: int
    content: str
    special: bool


def added_elsewhere(files: PinnedFiles, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> list[AddedToken]:
    """Return the tokens that other files add to a tokenizer.json, in the order of their ids."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, Mapping):  # a kind of tokenizer that is refused with a better message
        return []
    listed = tokenizer.get("added_tokens") or ()
    known = {*vocabulary, *(each["content"] for each in listed)}
    # An added token that the vocabulary has keeps its id there, below the size.
    following = max([len(vocabulary), *(each["id"] + 1 for each in listed)])
    found: dict[str, AddedToken] = {}
    for content, special in _named(files, settings):
        if content and content not in known and content not in found:
            found[content] = AddedToken(following + len(found), content, special)
    return list(found.values())


def _named(files: PinnedFiles, settings: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield the texts of tokens that the other files name, and whether they are special."""
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        for _, each in sorted(decoder.items(), key=lambda item: int(item[0])):
            yield each["content"], bool(each.get("special"))
    elif files.find(ADDED_FILE) is not None:
        numbers = read_json(files, ADDED_FILE)
        for content in sorted(numbers, key=lambda text: int(numbers[text])):
            yield content, False
    for role in ROLES:
        if (text := _text(settings.get(role))) is not None:
            yield text, True
    for name in LISTS:
        more = settings.get(name) or ()
        for each in more.values() if isinstance(more, Mapping) else more:
            if (text := _text(each)) is not None:
                yield text, True


def _text(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None
