"""Names that layouts share."""

from __future__ import annotations


def module_of(weight: str) -> str:
    """The module that a weight belongs to."""
    return weight.removesuffix(".weight")
