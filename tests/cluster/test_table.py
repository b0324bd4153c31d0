"""The table in docs/tested.md is of the cases that there are."""

from __future__ import annotations

import re

import pytest

from tests.cluster.table import HEAD, cases, merged, table
from tests.readme import table_of


@pytest.mark.quick
def test_every_row_is_of_a_case() -> None:
    head, line, *rows = table_of("clusters").splitlines()
    assert [head, line] == table([]).splitlines()
    for row in rows:
        name, *others = row.removeprefix("| ").removesuffix(" |").split(" | ")
        assert any(re.fullmatch(case, name) for case in cases()), name
        assert len(others) == len(HEAD) - 1


@pytest.mark.quick
def test_new_rows_take_the_place_of_old_ones() -> None:
    old = [("nothing", "0", "same", "0", ""), ("a raylet is killed", "0", "same", "9", "")]
    new = [("a raylet is killed", "0", "same", "3", ""), ("the head loses power", "1", "none", "", "")]
    assert merged(old, new) == [new[1], old[0], new[0]]
