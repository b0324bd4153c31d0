"""What all tables share: their look, and sizes and numbers in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from loaders.words import in_a_line, size

__all__ = ["in_a_line", "number", "size", "table", "times"]


class OneLineTable(Table):
    """A table in which a text is a cell of one line, whatever a stranger wrote into it."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(in_a_line(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table with these columns; those in `right`, which hold numbers, are aligned to the right."""
    made = OneLineTable(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def number(value: float | None, digits: int = 5) -> str:
    """Format a number of a report, in which None stands for infinity."""
    return "inf" if value is None else f"{value:.{digits}f}"


def times(ratio: float) -> str:
    """Say how many times smaller, or larger, something became."""
    return f"{ratio:.2f} times smaller" if ratio >= 1 or not ratio else f"{1 / ratio:.2f} times larger"
