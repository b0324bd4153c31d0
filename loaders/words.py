"""The words of messages: how many of what, how many bytes, what type of model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Control characters but the tab and the line feed; what turns the direction of a line; and halves of characters, which
# stand for bytes that are no UTF-8.
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """Return a text in which what a terminal would obey, instead of showing it, stands as escapes."""
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


# Where Python, or a terminal, ends a line.
LINE_BREAK = re.compile("[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")


def in_a_line(text: str) -> str:
    """Return a text as `shown` that takes one line, so that no words end the line or cell that they are in."""
    return shown(text).replace("\n", "\\n").replace("\t", "\\t")


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with what it counts: `many` is the plural where it takes more than an s.

    What follows the noun may be given with it: counted(n, "matrix stays", "matrices stay").
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def listed(names: Sequence[str], one: str, many: str) -> str:
    """Return names with what follows them, such as "is missing" after one and "are missing" after several."""
    return f"{', '.join(names)} {one if len(names) == 1 else many}"


def size(count: float) -> str:
    """Format bytes in decimal units: 1_234_567 becomes "1.23 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def model_type_said(config: Mapping[str, Any]) -> str:
    """Return what type of model a config.json says that it is, as a noun."""
    found = config.get("model_type")
    return f"model_type {found!r:.80}" if found else "a model without model_type"
