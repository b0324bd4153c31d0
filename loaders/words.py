"""The words of messages: how many of what, how many bytes, what type of model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with what it counts: `many` is the plural where it takes more than an s.

    What follows the noun may be given with it: counted(n, "matrix stays", "matrices stay").
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"


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
