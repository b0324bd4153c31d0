"""What all tables share: their look, and sizes in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from loaders.words import size

__all__ = ["size", "table", "times"]


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table with these columns; those in `right`, which hold numbers, are aligned to the right."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def times(ratio: float) -> str:
    """Say how many times smaller, or larger, something became."""
    return f"{ratio:.2f} times smaller" if ratio >= 1 or not ratio else f"{1 / ratio:.2f} times larger"
