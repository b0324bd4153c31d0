"""The table in docs/tested.md of what happens to clusters: `python -m tests.cluster.table` tries it and writes it.

What follows is pytest's: with tests/cluster/test_workers.py, or -k MLflow, the rows of other cases stay as they are.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.readme import table_of, write_table

ROW = "cluster"  # the property of a test's report that has its row
HEAD = ("what happens", "exit", "bytes", "time added, s", "remark")
Row = tuple[str, str, str, str, str]


def rows(stats: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Return the rows in the reports of a run of pytest: the last of each case."""
    found = {
        value[0]: tuple(value)
        for outcome in ("passed", "failed")
        for report in stats.get(outcome, ())
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == ROW
    }
    return list(found.values())


def table(found: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|---|---:|---|---:|---|", *(f"| {' | '.join(row)} |" for row in found)]
    return "\n".join(lines)


def cases() -> list[str]:
    """Return patterns of the cases' names, in which a parameter may stand, in the order of the tests."""
    found = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(each.arg == "case" for each in node.args.args):
                found.append(re.escape(ast.get_docstring(node) or "").replace(r"\{\}", ".+"))
    return found


def written() -> list[Row]:
    """Return the rows that docs/tested.md has of cases that there are."""
    _, _, *lines = table_of("clusters").splitlines()
    found = [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in lines]
    return [row for row in found if any(re.fullmatch(case, row[0]) for case in cases())]  # type: ignore[misc]


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return rows in the order of the tests, with the new ones in the place of the old ones of the same case."""
    found = {row[0]: row for row in (*old, *new)}
    order = cases()
    return sorted(found.values(), key=lambda row: [re.fullmatch(case, row[0]) is None for case in order])


class Rows:
    """A plugin of pytest that keeps the rows of the cases that pass."""

    def __init__(self) -> None:
        self.found: list[Row] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed:
            self.found += rows({"passed": [report]})


def main(arguments: Sequence[str]) -> int:
    """Run the cluster's tests and write the rows of those that pass."""
    kept = Rows()
    status = int(pytest.main(["-m", "cluster", *(arguments or ["tests/cluster"])], plugins=[kept]))
    write_table("clusters", table(merged(written(), kept.found)))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
