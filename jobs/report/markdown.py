"""Markdown: tables, and a stranger's texts in it, such as names of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

LONGEST = 600  # characters of one cell or line


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a table's lines; columns that begin with "-" hold numbers, which are aligned to the right."""
    yield "| " + " | ".join(column.removeprefix("-") for column in columns) + " |"
    yield "|" + "|".join("--:" if column.startswith("-") else "---" for column in columns) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def line(text: str) -> str:
    """Return a text as a part of one line, in which nothing of it is taken for HTML."""
    return one_line(text)[:LONGEST].replace("<", "&lt;")


def one_line(text: str) -> str:
    return " ".join(text.split())


def code(text: str) -> str:
    """Return a text as code; a backtick in it would end the code."""
    return f"`{one_line(text)[:LONGEST].replace('`', chr(39))}`"
