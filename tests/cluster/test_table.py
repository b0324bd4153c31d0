"""The table in docs/tested.md is of the cases that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.cluster.table import HEAD, table
from tests.readme import table_of


def cases() -> list[str]:
    """Return patterns of the cases' names, in which a parameter may stand."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(each.arg == "case" for each in node.args.args):
                found.append(re.escape(ast.get_docstring(node) or "").replace(r"\{\}", ".+"))
    return found


@pytest.mark.quick
def test_every_row_is_of_a_case() -> None:
    head, line, *rows = table_of("clusters").splitlines()
    assert [head, line] == table([]).splitlines()
    for row in rows:
        name, *others = row.removeprefix("| ").removesuffix(" |").split(" | ")
        assert any(re.fullmatch(case, name) for case in cases()), name
        assert len(others) == len(HEAD) - 1
