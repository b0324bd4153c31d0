"""What all tables share: their look, and sizes in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def size(count: float) -> str:
    """Format bytes in decimal units: 1_234_567 becomes "1.23 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table with these columns; those in `right`, which hold numbers, are aligned to the right."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def times(ratio: float) -> str:
    """Say how many times smaller, or larger, something became."""
    return f"{ratio:.2f} times smaller" if ratio >= 1 or not ratio else f"{1 / ratio:.2f} times larger"
