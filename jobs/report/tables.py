"""What all tables share: how they fit the terminal, and sizes and numbers in words.

A number is never wrapped or cut. Where a table is wider than its terminal, names lose what they begin and end with in
all rows, which is said once above; then columns are left out from the right, the least important, and named below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.table import Table as Grid
from rich.text import Text

from loaders.words import in_a_line, size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Table", "in_a_line", "number", "size", "table", "times"]

GAP = 2  # spaces between columns
NAMES = 8  # the least width of folded names
PROSE = 24  # the least width of a column of sentences
SEPARATORS = "-./:=, "  # between the parts of names
PARTS = re.compile(r"[^-._/]*[-._/]*")
Cell = str | Text


class Table:
    """A table that fits what it is printed on. Columns stand in the order of their importance.

    Of a console that has `all_columns` set, the columns that do not fit follow in further parts.

    keys: how many of the first columns stay, the last of which has names that may be folded. right: titles of the
    columns of numbers. prose: of sentences, which are wrapped. names: of names, whose common beginning and end may be
    said once; columns of one title share them. With `once`, a column that has the same in all rows is said once, too.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        keys: int = 1,
        right: Sequence[str] = (),
        prose: Sequence[str] = (),
        names: Sequence[str] = (),
        once: bool = False,
    ) -> None:
        self.columns = list(columns)
        self.keys = keys
        self.rows: list[list[Cell]] = []
        self._right, self._prose, self._names, self._once = set(right), set(prose), set(names), once

    def add_row(self, *cells: Cell) -> None:
        """Add a row; cells that are not given are empty. A text takes one line, whoever wrote it."""
        said = [in_a_line(cell) if isinstance(cell, str) else cell for cell in cells]
        self.rows.append([*said, *[""] * (len(self.columns) - len(said))])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, every = options.max_width, getattr(console, "all_columns", None)
        visible, same = self._varying() if self._once and len(self.rows) > 1 else (list(range(len(self.columns))), [])
        if same:
            yield Text(f"in all rows: {', '.join(same)}")
        rows = self.rows
        if self._names and sum(self._widths(rows, visible).values()) + GAP * (len(visible) - 1) > width:
            rows, ends = self._shortened(visible)
            yield from (Text(line) for line in ends)
        widths, keys = self._widths(rows, visible), visible[: self.keys]
        left = visible[self.keys :]
        while True:
            taken = self._fitting(keys, left, widths, width)
            yield self._grid(rows, [*keys, *taken], widths, width)
            left = left[len(taken) :]
            if not left:
                return
            if not every:
                names = ", ".join(dict.fromkeys(self.columns[c] for c in left if self.columns[c]))
                how = "a wider terminal" + ("" if every is None else ", or columns=all")
                yield Text(f"for more columns ({names}): {how}", style="dim")
                return

    def _varying(self) -> tuple[list[int], list[str]]:
        """Return the columns that are not the same in all rows, and what the others are."""
        same = [c for c in range(self.keys, len(self.columns)) if len({str(row[c]) for row in self.rows}) == 1]
        said = [f"{self.columns[c]} {self.rows[0][c]}".strip() for c in same if str(self.rows[0][c])]
        return [c for c in range(len(self.columns)) if c not in same], said

    def _shortened(self, columns: Sequence[int]) -> tuple[list[list[Cell]], list[str]]:
        """Return the rows without what all names of a column begin and end with, and lines that say it."""
        rows, said = [list(row) for row in self.rows], list[str]()
        for title in dict.fromkeys(self.columns[c] for c in columns if self.columns[c] in self._names):
            same = [c for c in columns if self.columns[c] == title]
            begin, end = common_ends([str(row[c]) for row in rows for c in same if str(row[c])])
            if not begin and not end:
                continue
            for row in rows:
                for c in same:
                    row[c] = _cut(row[c], len(begin), len(end))
            said.append(" ".join(filter(None, [f"{title}:", begin, "...", end])))
        return rows, said

    def _widths(self, rows: Sequence[Sequence[Cell]], columns: Sequence[int]) -> dict[int, int]:
        """Return what each column takes, in which its title may be wrapped between words."""
        return {
            c: max(
                [max(map(cell_len, self.columns[c].split()), default=0), *(cell_len(str(row[c])) for row in rows)],
                default=0,
            )
            for c in columns
        }

    def _least(self, column: int, widths: Mapping[int, int]) -> int:
        return min(PROSE, widths[column]) if self.columns[column] in self._prose else widths[column]

    def _fitting(self, keys: Sequence[int], left: Sequence[int], widths: Mapping[int, int], width: int) -> list[int]:
        """Return the first columns of `left` that fit beside the keys, but at least one, for which names are folded."""
        taken, used = list[int](), sum(self._least(c, widths) + GAP for c in keys) - GAP
        for column in left:
            used += GAP + self._least(column, widths)
            if used > width and taken:
                break
            taken.append(column)
        return taken

    def _grid(
        self, rows: Sequence[Sequence[Cell]], columns: Sequence[int], widths: Mapping[int, int], width: int
    ) -> Grid:
        """Return the table of some columns: what is left of the width is that of sentences."""
        taken = {c: self._least(c, widths) for c in columns}
        spare = width - sum(taken.values()) - GAP * (len(columns) - 1)
        if spare < 0:  # only names are folded
            names = columns[self.keys - 1]
            taken[names] = max(NAMES, taken[names] + spare)
        for column in columns:  # titles are wrapped only where they must
            more = min(max(0, cell_len(self.columns[column]) - taken[column]), max(0, spare))
            whole = taken[column] + more >= cell_len(self.columns[column])
            taken[column], spare = (taken[column] + more, spare - more) if whole else (taken[column], spare)
        prose = [c for c in columns if self.columns[c] in self._prose]
        for at, column in enumerate(sorted(prose, key=lambda c: widths[c])):
            more = min(widths[column] - taken[column], max(0, spare) // (len(prose) - at))
            taken[column], spare = taken[column] + more, spare - more
        grid = Grid(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
        for column in columns:
            is_right = self.columns[column] in self._right
            justify: Literal["right", "left"] = "right" if is_right else "left"
            grid.add_column(self.columns[column], justify=justify, overflow="fold", width=taken[column])
        for row in rows:
            grid.add_row(
                *(_folded(row[c], taken[c]) if self.columns[c] not in self._prose else row[c] for c in columns)
            )
        return grid


def table(
    *columns: str,
    keys: int = 1,
    right: Sequence[str] = (),
    prose: Sequence[str] = (),
    names: Sequence[str] = (),
    once: bool = False,
) -> Table:
    """Return an empty table with these columns, the most important first; see `Table`."""
    return Table(columns, keys=keys, right=right, prose=prose, names=names, once=once)


def common_ends(names: Sequence[str]) -> tuple[str, str]:
    """Return what all names begin with and what they end with, in whole parts; of each name something is left."""
    if len(names) < 2:
        return "", ""
    begin = _beginning(names)
    while begin and (begin[-1] not in SEPARATORS or len(begin) == min(map(len, names))):
        begin = begin[:-1]
    turned = [name[len(begin) :][::-1] for name in names]
    end = _beginning(turned)
    while end and (end[-1] not in SEPARATORS or len(end) == min(map(len, turned))):
        end = end[:-1]
    return begin, end[::-1]


def _beginning(texts: Sequence[str]) -> str:
    """Return the characters that all texts begin with."""
    least, most = min(texts), max(texts)  # whatever these share, those between them share
    same = next((at for at, (x, y) in enumerate(zip(least, most, strict=False)) if x != y), len(least))
    return least[:same]


def _cut(cell: Cell, begin: int, end: int) -> Cell:
    """Return a name without its beginning and its end; an empty cell stays."""
    short = str(cell)[begin : max(begin, len(str(cell)) - end)]
    return short if isinstance(cell, str) else Text(short, style=cell.style)


def _folded(cell: Cell, width: int) -> Cell:
    """Return a name that is wider than its column with line breaks between its parts."""
    text = str(cell)
    if cell_len(text) <= width:
        return cell
    lines = [""]
    for part in PARTS.findall(text):
        if lines[-1] and cell_len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    folded = "\n".join(lines)
    return folded if isinstance(cell, str) else Text(folded, style=cell.style)


def number(value: float | None, digits: int = 5) -> str:
    """Format a number of a report, in which None stands for infinity."""
    return "inf" if value is None else f"{value:.{digits}f}"


def times(ratio: float) -> str:
    """Say how many times smaller, or larger, something became."""
    return f"{ratio:.2f} times smaller" if ratio >= 1 or not ratio else f"{1 / ratio:.2f} times larger"


def whole(line: str, style: str = "") -> Text:
    """Return an address, a path or a line of code as one unbroken line, so that it can be clicked and pasted."""
    return Text(line, style=style, no_wrap=True, overflow="ignore")
