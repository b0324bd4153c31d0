"""Signs of life: what a driver says of itself in the journal, and that a job is the same with and without."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from jobs.output.journal import Journal
from jobs.output.life import Life, Seen, SignsOfLife, Told, life_from
from loaders.errors import StorageError
from loaders.storage.address import Address
from tests.journals import find_journals

pytestmark = pytest.mark.quick
SEEN = Seen(doing="quantizing", seconds=2.0, units=5, done=1, retries=0, work_bytes=50, done_bytes=10, bytes_per_s=5.0)


def signs(journal: Journal, failure: str = "") -> SignsOfLife:
    told = Told(journal=journal, units=7, resumed=2, done=lambda: 3, failure=lambda: failure)
    return SignsOfLife([told], lambda: SEEN, "this process", {"weightmill": "1"})


def read(journal: Journal) -> Life:
    found = life_from(journal.destination.get("life.json") or b"")
    assert found is not None
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(Address.of(tmp_path / "out"), "a" * 12)


def wait_for(journal: Journal) -> Life:
    for _ in range(500):
        if (raw := journal.destination.get("life.json")) and (found := life_from(raw)) is not None:
            return found
        time.sleep(0.01)
    raise AssertionError("no sign of life")


def test_a_driver_says_what_is_done_while_it_works_and_at_last_how_it_ended(journal: Journal, tmp_path: Path) -> None:
    with journal.hold({}, overwrite=False):
        with signs(journal).given():
            life = wait_for(journal)
            assert (life.state, life.seen) == ("running", SEEN)
            assert (life.units, life.units_done, life.units_resumed) == (7, 3, 2)
            # It is a file of the journal's own.
            assert find_journals(tmp_path) == [journal.destination.root]
        assert read(journal).state == "published"
        with pytest.raises(KeyboardInterrupt), signs(journal).given():
            raise KeyboardInterrupt
        assert read(journal).state == "stopped"
        with pytest.raises(StorageError), signs(journal).given():
            raise StorageError("https://me:secret@host: the disk is full")
        assert (read(journal).state, read(journal).why) == ("failed", "https://***@host: the disk is full")
        with signs(journal, "another reason").given():
            pass
        assert (read(journal).state, read(journal).why) == ("failed", "another reason")
    # What an earlier attempt said is gone when the next one takes the journal.
    with journal.hold({}, overwrite=False):
        assert journal.destination.get("life.json") is None
        with signs(journal).given():
            pass
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_sign_that_cannot_be_written_is_left_out(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def full(name: str, data: bytes) -> None:
        tried.append(name)
        raise StorageError("the disk is full")

    with journal.hold({}, overwrite=False), monkeypatch.context() as patch:
        patch.setattr(journal.destination, "put", full)
        with signs(journal).given():
            pass
    assert set(tried) == {"life.json"}


def test_a_damaged_sign_is_none(journal: Journal) -> None:
    with journal.hold({}, overwrite=False), signs(journal).given():
        pass
    raw: Any = journal.destination.get("life.json")
    assert life_from(raw) is not None
    assert life_from(raw.replace(b"quantizing", b"quantizinG")) is None
    assert life_from(b"{}") is None
