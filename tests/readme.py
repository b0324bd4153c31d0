"""The tables in docs/tested.md of what is tested; `python -m tests.readme` writes them from the tests' declarations."""

from __future__ import annotations

import re

from loaders.places import ROOT

README = ROOT / "README.md"
TESTED = ROOT / "docs" / "tested.md"
PLACE = r"(?s)(<!-- {0}: python -m tests\.[\w.]+(?: --write)? -->\n\n)(.*?)(?=\n\n<!-- end {0} -->)"


def table_of(name: str) -> str:
    """Return the table between the markers of a name."""
    found = re.search(PLACE.format(name), TESTED.read_text())
    assert found is not None, f"docs/tested.md: no table {name}"
    return found[2]


def write_table(name: str, table: str) -> None:
    """Write a table between its markers."""
    TESTED.write_text(re.sub(PLACE.format(name), lambda found: found[1] + table, TESTED.read_text()))


def main() -> None:
    """Write all tables."""
    from tests import sources, written_types
    from tests.parity import matrix

    write_table("matrix", matrix.table())
    write_table("sources", sources.table())
    write_table("families", written_types.table())


if __name__ == "__main__":
    main()
