"""The model card's file and its marked blocks, which say what may differ between two runs of the same job.

A card has one block in its front matter (YAML comments mark it) and one in its text (HTML comments do). They tell where
the source was, the command, the versions. What is compared or hashed is the card without what is inside of them.
"""

from __future__ import annotations

import xxhash

from loaders.storage.base import Entry, Store
from loaders.storage.hashes import hash_stored

CARD = "README.md"
BEGIN, END = "<!-- weightmill begin -->", "<!-- weightmill end -->"
FRONT_BEGIN, FRONT_END = "# weightmill begin", "# weightmill end"
FENCE = "---"  # the line before and after front matter
# The most bytes of a card that are read at once. Ours are smaller, since a source's larger card is left out of them.
LIMIT = 16 << 20


def without_blocks(card: bytes) -> bytes:
    """Return a card without what is inside of its blocks; other files come back as they are."""
    front, text = _apart(card)
    return _emptied(front, FRONT_BEGIN, FRONT_END) + _emptied(text, BEGIN, END)


def with_block(card: bytes, block: str) -> bytes:
    """Return a card with another block in its text; a card without one comes back as it is."""
    front, text = _apart(card)
    found = _inside(text, BEGIN, END)
    return card if found is None else front + text[: found[0]] + f"\n{block}\n".encode() + text[found[1] :]


def around_block(text: bytes) -> tuple[bytes, bytes]:
    """Return what stands before and after the block in a text; all is before it if there is none."""
    found = _inside(text, BEGIN, END)
    return (text, b"") if found is None else (text[: found[0] - len(BEGIN)], text[found[1] + len(END) :])


def aux_digest(store: Store, entry: Entry) -> str:
    """Return the xxh3-128 of an auxiliary file as the report has it: a card's is without its blocks.

    Raises:
        As `Store.read`.
    """
    if entry.name != CARD or entry.size > LIMIT:
        return hash_stored(store, entry)
    return card_digest(bytes(store.read(entry, 0, entry.size)))


def card_digest(card: bytes) -> str:
    """Return the xxh3-128 of a card without its blocks."""
    return xxhash.xxh3_128_hexdigest(without_blocks(card))


def _apart(card: bytes) -> tuple[bytes, bytes]:
    """Return the front matter with both its fences, and the text after it."""
    fence = f"{FENCE}\n".encode()
    end = card.find(b"\n" + fence) if card.startswith(fence) else -1
    cut = 0 if end < 0 else end + 1 + len(fence)
    return card[:cut], card[cut:]


def _inside(text: bytes, begin: str, end: str) -> tuple[int, int] | None:
    """Return where the inside of the first block is; None if there is none that ends."""
    start = text.find(begin.encode())
    stop = text.find(end.encode(), start + len(begin))
    return None if start < 0 or stop < 0 else (start + len(begin), stop)


def _emptied(text: bytes, begin: str, end: str) -> bytes:
    found = _inside(text, begin, end)
    return text if found is None else text[: found[0]] + b"\n" + text[found[1] :]
