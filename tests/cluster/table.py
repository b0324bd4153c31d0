"""The table in docs/tested.md of what happens to clusters: `python -m tests.cluster.table` tries it and writes it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.readme import write_table

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


class Rows:
    """A plugin of pytest that keeps the rows."""

    def __init__(self) -> None:
        self.found: list[Row] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.found += rows({"passed": [report]})


def main() -> int:
    """Run the cluster's tests and write the table, if all pass."""
    kept = Rows()
    status = int(pytest.main(["-m", "cluster", "tests/cluster"], plugins=[kept]))
    if status == 0:
        write_table("clusters", table(kept.found))
    return status


if __name__ == "__main__":
    sys.exit(main())
