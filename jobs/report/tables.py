"""What all tables share: their look, and sizes and numbers in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from loaders.words import size

__all__ = ["number", "size", "table", "times"]


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table with these columns; those in `right`, which hold numbers, are aligned to the right."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def number(value: float | None, digits: int = 5) -> str:
    """Format a number of a report, in which None stands for infinity."""
    return "inf" if value is None else f"{value:.{digits}f}"


def times(ratio: float) -> str:
    """Say how many times smaller, or larger, something became."""
    return f"{ratio:.2f} times smaller" if ratio >= 1 or not ratio else f"{1 / ratio:.2f} times larger"
