"""The table in docs/tested.md has a row for every case."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.cluster.table import HEAD, table
from tests.readme import table_of


def cases() -> list[str]:
    """Return the beginnings of the cases' names, which go on with a parameter where they have one."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(each.arg == "case" for each in node.args.args):
                found += [(ast.get_docstring(node) or "").partition("{}")] * node.name.startswith("test_")
    return [begins or ends for begins, _, ends in found]


@pytest.mark.quick
def test_every_case_has_a_row() -> None:
    shown = table_of("clusters")
    assert [name for name in cases() if name not in shown] == []
    assert shown.splitlines()[:2] == table([]).splitlines()
    assert all(row.count(" | ") == len(HEAD) - 1 for row in shown.splitlines()[2:])
