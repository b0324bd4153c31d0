"""Every reader over some damaged inputs, the same each time; `python -m tests.fuzz` goes on for as long as it may."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz import hostile
from tests.fuzz.campaign import Worker
from tests.fuzz.readers import READERS


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("fuzz")) as made:
        yield made


@pytest.mark.parametrize("reader", READERS)
def test_damaged_input_is_read_or_refused_by_an_error_of_ours_within_limits(reader: str, worker: Worker) -> None:
    counts, found = worker.ask(reader, examples=READERS[reader].examples, seed=None)
    assert [f"{each.what}\n{each.trace}" for each in found] == []
    assert counts["inputs"] >= READERS[reader].examples // 2  # of those that differ


@pytest.mark.parametrize("reader", sorted({kept.reader for kept in hostile.kept()}))
def test_what_was_once_read_wrongly_is_read_or_refused(reader: str, worker: Worker) -> None:
    counts, found = worker.ask(reader, hostile=True)
    assert [f"{each.what}\n{each.trace}" for each in found] == []
    assert counts["inputs"] == len([*hostile.kept(reader)])
