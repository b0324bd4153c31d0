"""The cache of ranges: what was fetched is fetched no more, by any process, while it is whole and there is room."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import Entry, Range
from loaders.storage.range_cache import CachedStore, RangeCache
from loaders.storage.settings import StoreSettings, current, use
from tests import sources
from tests.proxy import Proxy
from tests.shelf.places import ShelfPlace, fill

BODY = bytes(range(256)) * 40


class Given:
    """A store of one file, which counts what is read of it."""

    is_local = False
    address = Address.of("given://there")

    def __init__(self) -> None:
        self.reads: list[Range] = []

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        self.reads.append((start, stop))
        return memoryview(BODY[start:stop])

    def read_ranges(self, entry: Entry, ranges: Sequence[Range]) -> Iterator[memoryview]:
        return (self.read(entry, *each) for each in ranges)


ENTRY = Entry("file", len(BODY), '"tag"')


@pytest.fixture
def given() -> Given:
    return Given()


@pytest.fixture
def made(given: Given, tmp_path: Path) -> Callable[..., CachedStore]:
    """A function that opens the store with a cache of a limit, as a process of its own would."""
    return lambda limit=10**6: CachedStore(given, RangeCache(tmp_path / "ranges", limit))  # type: ignore[arg-type]


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "ranges").rglob("*-*") if path.is_file())


def test_only_what_is_missing_is_fetched(made: Callable[..., CachedStore], given: Given) -> None:
    for start, stop in ((0, 100), (50, 200), (300, 400), (0, 500), (10, 390), (99, 101)):
        assert bytes(made().read(ENTRY, start, stop)) == BODY[start:stop]
    assert given.reads == [(0, 100), (100, 200), (300, 400), (200, 300), (400, 500)]
    assert [bytes(data) for data in made().read_ranges(ENTRY, [(5, 9), (480, 520)])] == [BODY[5:9], BODY[480:520]]
    assert given.reads[5:] == [(500, 520)]


def test_another_version_is_another_file(made: Callable[..., CachedStore], given: Given) -> None:
    for entry in (ENTRY, Entry("file", len(BODY), '"other"'), Entry("other", len(BODY), '"tag"')):
        made().read(entry, 0, 10)
    assert len(given.reads) == 3


def test_nothing_is_kept_of_files_without_versions(made: Callable[..., CachedStore], given: Given) -> None:
    for _ in range(2):
        made().read(Entry("file", len(BODY), "unknown"), 0, 10)
    assert len(given.reads) == 2


@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_a_damaged_file_is_fetched_again(
    damage: str, made: Callable[..., CachedStore], given: Given, tmp_path: Path
) -> None:
    made().read(ENTRY, 0, 100)
    [path] = kept(tmp_path)
    raw = path.read_bytes()
    path.write_bytes({"flipped": raw[:50] + b"\0" + raw[51:], "short": raw[:-1], "empty": b""}[damage])
    for _ in range(2):
        assert bytes(made().read(ENTRY, 0, 100)) == BODY[:100]
    assert given.reads == [(0, 100), (0, 100)]


def test_what_was_not_used_for_longest_goes_first(
    made: Callable[..., CachedStore], given: Given, tmp_path: Path
) -> None:
    store = made()
    for start in range(0, 1000, 100):
        store.read(ENTRY, start, start + 100)
    for age, path in enumerate(sorted(kept(tmp_path), key=lambda p: int(p.name.split("-")[0]))):
        os.utime(path, (1000 + age, 1000 + age))
    store.read(ENTRY, 0, 100)  # used now
    made(limit=1000).read(ENTRY, 2000, 2100)
    left = {path.name for path in kept(tmp_path)}
    assert {"0-100", "900-1000", "2000-2100"} <= left
    assert "100-200" not in left
    assert sum(path.stat().st_size for path in kept(tmp_path)) <= 1000
    assert sum(path.stat().st_size for path in (tmp_path / "ranges").rglob("*") if path.is_file()) <= 1100


def test_a_disk_that_does_not_keep_it_is_no_error(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = CachedStore(given, RangeCache(tmp_path / "file" / "ranges", 10**6))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "weightmill"):
        for _ in range(3):
            assert bytes(store.read(ENTRY, 0, 10)) == BODY[:10]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'file' / 'ranges'}: nothing more is kept there: Not a directory"
    ]


def test_a_full_disk_switches_it_off_with_a_note(
    made: Callable[..., CachedStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    store = made()
    monkeypatch.setattr(Path, "replace", full)
    with caplog.at_level(logging.WARNING, "weightmill"):
        for start in (0, 10):
            assert bytes(store.read(ENTRY, start, start + 10)) == BODY[start : start + 10]
    assert "nothing more is kept there: No space left on device" in caplog.text
    assert kept(tmp_path) == []
    assert [path for path in (tmp_path / "ranges").rglob("*") if path.is_file() and path.name != "lock"] == []


def test_a_second_job_fetches_nothing(shelves: Address, tmp_path: Path, weightmill: Any) -> None:
    before = current()
    place = fill(ShelfPlace(shelves / tmp_path.name), sources.base(tmp_path), "model")
    try:
        with Proxy(f"http://{urlsplit(place.text).netloc}") as proxy:
            address = place.text.replace(urlsplit(place.text).netloc, proxy.host)
            for preset, unit_mb in (("nf4", "0.05"), ("hqq4", "1")):
                proxy.forget()
                ran = weightmill(
                    "run", f"model.path={address}", f"output.path={tmp_path / preset}", f"quant={preset}",
                    f"unit_mb={unit_mb}", f"store.cache={tmp_path / 'cache'}",
                )  # fmt: skip
                assert ran.status == 0, ran.err
                fetched = [seen for seen in proxy.seen if seen.range is not None]
                assert bool(fetched) == (preset == "nf4")
    finally:
        use(before)


def test_folders_and_no_cache_are_left_alone(tmp_path: Path, shelves: Address) -> None:
    before = current()
    try:
        assert not isinstance(open_store(shelves / "x"), CachedStore)
        use(StoreSettings(cache=str(tmp_path)))
        assert isinstance(open_store(shelves / "x"), CachedStore)
        assert not isinstance(open_store(tmp_path), CachedStore)
    finally:
        use(before)
