"""The strategy `remote`: what it fetches, when, and how much of it is held."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from loaders.backends.threads import Stopped
from loaders.dtypes import DTYPES
from loaders.errors import BadCheckpoint, BadSpec, StorageError
from loaders.specs import WeightSpec
from loaders.storage.address import Address
from loaders.storage.base import Entry, PinnedFiles, Range
from loaders.storage.settings import StoreSettings, current, use
from loaders.strategies import PieceReader, loader
from loaders.strategies.base import Expecting, TensorBytes, Use
from loaders.strategies.reading.announced import Ahead
from loaders.strategies.reading.fetching import Fetcher
from loaders.strategies.reading.segments import Run, joined, without
from loaders.strategies.remote import RemoteFiles

MB = 1 << 20
FILE = np.random.default_rng(0).integers(0, 256, 64 * MB, np.uint8)


class Reader(PieceReader, Expecting, Protocol): ...


class Given:
    """A store of one file in memory. Reads wait while `held` is clear, and fail by `error`."""

    is_local = False
    address = Address.of("given://there")

    def __init__(self) -> None:
        self.reads: list[Range] = []
        self.held = threading.Event()
        self.held.set()
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)

    def read(self, entry: Entry, start: int, stop: int) -> memoryview:
        self.reads.append((start, stop))
        assert self.held.wait(30)
        if self.error is not None:
            raise self.error
        return memoryview(FILE[start:stop].tobytes())


@pytest.fixture
def store() -> Given:
    return Given()


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path) -> Iterator[None]:
    before = current()
    use(StoreSettings(scratch=str(tmp_path)))
    yield
    use(before)


def files_of(store: Given) -> PinnedFiles:
    return PinnedFiles(store, [Entry("file", FILE.size, "tag")])  # type: ignore[arg-type]


@pytest.fixture
def opened(store: Given) -> Iterator[Callable[[int], Reader]]:
    """A function that opens a reader with a budget of MiB."""
    made: list[RemoteFiles] = []

    def make(budget: int) -> Reader:
        made.append(RemoteFiles(files_of(store), Fetcher(budget * MB)))
        return made[-1]

    yield make
    store.held.set()
    for reader in made:
        reader.close()


def tensor(start: int, size: int) -> WeightSpec:
    return WeightSpec(
        name=f"t{start}", dtype=DTYPES["U8"], shape=(size,), stride=None, file="file", offset=start, size=size
    )


def uses_of(specs: Sequence[WeightSpec], *, is_once: bool = False) -> list[Use]:
    return [Use((TensorBytes.whole(spec),), is_once) for spec in specs]


def fetched_ahead(store: Given, size: int) -> None:
    """Wait until so many bytes were asked for, and see that it stays so."""
    wait = threading.Event()
    while sum(stop - start for start, stop in store.reads) < size:
        wait.wait(0.001)


def shared(reader: Any) -> Fetcher:
    ahead: Ahead = reader._ahead
    return ahead._shared


def test_neighbours_share_a_request(store: Given, opened: Callable[[int], Reader]) -> None:
    reader = opened(64)
    specs = [tensor(at * 1000, 1000) for at in range(50)]
    reader.expect(uses_of(specs))
    for spec in specs:
        assert np.array_equal(reader.read(spec, 10, 20), FILE[spec.offset + 10 : spec.offset + 20])
    assert store.reads == [(0, 50_000)]


def test_a_large_tensor_is_cut_and_fetched_side_by_side(store: Given, opened: Callable[[int], Reader]) -> None:
    reader, spec = opened(128), tensor(123, 17 * MB)
    [use] = uses_of([spec])
    store.held.clear()
    reader.expect([use])
    fetched_ahead(store, spec.size)
    assert len(store.reads) == 5
    store.held.set()
    with reader.using(use):
        assert np.array_equal(reader.read(spec, 3 * MB, 9 * MB), FILE[123 + 3 * MB : 123 + 9 * MB])
        assert np.array_equal(reader.mapped(spec), FILE[123 : 123 + spec.size])
    assert sum(stop - start for start, stop in store.reads) == spec.size


def test_what_was_not_announced_is_fetched_as_asked(store: Given, opened: Callable[[int], Reader]) -> None:
    reader = opened(64)
    assert np.array_equal(reader.read(tensor(100, 1000), 5, 9), FILE[105:109])
    assert store.reads == [(105, 109)]


@pytest.mark.parametrize("is_once", [True, False])
def test_what_is_held_stays_within_the_budget(is_once: bool, store: Given, opened: Callable[[int], Reader]) -> None:
    reader = opened(16)
    specs = [tensor(at * 2 * MB, 2 * MB) for at in range(32)]
    uses = uses_of(specs, is_once=is_once)
    reader.expect(uses)
    most = 0
    for spec, each in zip(specs, uses, strict=True):
        with reader.using(each):
            for at in range(0, spec.size, MB // 2):
                found = reader.read(spec, at, at + MB // 2)
                assert np.array_equal(found, FILE[spec.offset + at : spec.offset + at + MB // 2])
                runs = reader._ahead._runs["file"]  # type: ignore[attr-defined]
                there = [s for run in runs for s in run.segments if s.state.name in ("THERE", "UNDER_WAY")]
                most = max(most, sum(s.size for s in there))
    assert most <= 16 * MB
    assert sum(stop - start for start, stop in store.reads) == FILE.size


def test_what_is_read_once_is_freed_at_once_however_large(store: Given, opened: Callable[[int], Reader]) -> None:
    reader, spec = opened(16), tensor(0, FILE.size)
    [use] = uses_of([spec], is_once=True)
    reader.expect([use])
    with reader.using(use):
        for at in range(0, spec.size, MB):
            assert np.array_equal(reader.read(spec, at, at + MB), FILE[at : at + MB])
            [run] = reader._ahead._runs["file"]  # type: ignore[attr-defined]
            assert sum(s.state.name in ("THERE", "UNDER_WAY") for s in run.segments) <= 8
    assert sum(stop - start for start, stop in store.reads) == FILE.size


def test_what_is_read_again_after_all_is_fetched_again(store: Given, opened: Callable[[int], Reader]) -> None:
    reader, spec = opened(64), tensor(0, 8 * MB)
    [use] = uses_of([spec], is_once=True)
    reader.expect([use])
    with reader.using(use):
        for _ in range(3):
            for at in range(0, spec.size, MB):
                assert np.array_equal(reader.read(spec, at, at + MB), FILE[at : at + MB])


def test_what_does_not_fit_goes_to_scratch_one_after_another(
    store: Given, opened: Callable[[int], Reader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = opened(16)
    specs = [tensor(0, 20 * MB), tensor(20 * MB, 20 * MB), tensor(40 * MB, 2 * MB)]
    uses = uses_of(specs)
    reader.expect(uses)
    sizes: list[int] = []
    honest = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: sizes.append(len(data)) or honest(fd, data, at))
    entered, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with reader.using(uses[1]):
            entered.set()
            assert np.array_equal(reader.read(specs[1], 0, 20 * MB), FILE[20 * MB : 40 * MB])

    thread = threading.Thread(target=other)
    with reader.using(uses[0]):
        for _ in range(2):
            assert np.array_equal(reader.read(specs[0], 0, 20 * MB), FILE[: 20 * MB])
        thread.start()
        go_on.wait(0.05)
        assert not entered.is_set()  # one at a time
    thread.join(30)
    assert entered.is_set()
    with reader.using(uses[2]):
        assert np.array_equal(reader.read(specs[2], 0, MB), FILE[40 * MB : 41 * MB])
    assert sum(sizes) == 40 * MB
    assert list(tmp_path.iterdir()) == []  # scratch has no names


def test_a_full_disk_of_scratch_is_one_clear_error(
    opened: Callable[[int], Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, spec = opened(16), tensor(0, 20 * MB)
    [use] = uses_of([spec])
    reader.expect([use])

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"writing scratch in .*No space left.*free some space"), reader.using(use):
        reader.read(spec, 0, MB)


def test_groups_wait_for_room_and_then_go_on(store: Given, opened: Callable[[int], Reader]) -> None:
    reader = opened(16)
    specs = [tensor(at * 6 * MB, 6 * MB) for at in range(10)]
    uses = uses_of(specs)
    reader.expect(uses)

    def step(spec: WeightSpec, each: Use) -> None:
        with reader.using(each):
            for _ in range(2):
                assert np.array_equal(reader.read(spec, 0, spec.size), FILE[spec.offset : spec.offset + spec.size])

    threads = [threading.Thread(target=step, args=pair) for pair in zip(specs, uses, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert sum(stop - start for start, stop in store.reads) == 60 * MB


def test_partners_are_one_use(store: Given, opened: Callable[[int], Reader]) -> None:
    reader, specs = opened(64), [tensor(0, MB), tensor(MB, MB)]
    use = Use(tuple(map(TensorBytes.whole, specs)), steps=2)
    reader.expect([use])
    for _ in range(2):
        with reader.using(use):
            for spec in specs:
                assert len(reader.read(spec, 0, MB)) == MB
    assert store.reads == [(0, 2 * MB)]


def test_an_error_reaches_every_thread_that_needs_the_bytes(store: Given, opened: Callable[[int], Reader]) -> None:
    reader, spec = opened(64), tensor(0, MB)
    store.error = StorageError("the server is gone")
    [use] = uses_of([spec])
    reader.expect([use])
    for _ in range(2):
        with pytest.raises(StorageError, match="the server is gone"), reader.using(use):
            reader.read(spec, 0, 10)


def test_a_store_that_gives_less_than_was_asked_for_is_not_believed(
    store: Given, opened: Callable[[int], Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "read", lambda entry, start, stop: memoryview(b"few"))
    reader, spec = opened(64), tensor(5, MB)
    reader.expect(uses_of([spec]))
    with pytest.raises(BadCheckpoint, match=r"file: expected 1048576 bytes from byte 5 on, found 3"):
        reader.read(spec, 0, 10)


def test_who_waits_for_bytes_can_be_stopped(store: Given, opened: Callable[[int], Reader]) -> None:
    reader, spec, stop = opened(64), tensor(0, MB), threading.Event()
    store.held.clear()
    reader.expect(uses_of([spec]), stop)
    stop.set()
    with pytest.raises(Stopped):
        reader.read(spec, 0, 10)


def test_readers_share_what_is_fetched_ahead(store: Given, opened: Callable[[int], Reader]) -> None:
    one = opened(64)
    other = RemoteFiles(files_of(store), shared(one))
    store.held.clear()
    one.expect(uses_of([tensor(0, 30 * MB)], is_once=True))
    other.expect(uses_of([tensor(30 * MB, 30 * MB)], is_once=True))
    fetched_ahead(store, 44 * MB)
    assert any(start >= 30 * MB for start, _ in store.reads)
    assert sum(stop - start for start, stop in store.reads) <= 48 * MB
    other.close()


def test_a_budget_without_room_is_refused() -> None:
    with pytest.raises(BadSpec, match=r"strategy\.memory_budget_mb: expected at least 64, found 10"):
        loader("remote", memory_budget_mb=10)


@pytest.mark.quick
def test_ranges() -> None:
    assert list(joined([(5, 7, 0), (0, 3, 0), (3, 5, 0), (6, 9, 1), (20, 21, 1)])) == [
        (0, 5, 0), (5, 9, 1), (20, 21, 1),
    ]  # fmt: skip
    assert list(without([(0, 10, 1)], [(2, 3), (5, 6), (9, 12)])) == [(0, 2, 1), (3, 5, 1), (6, 9, 1)]
    assert list(without([(3, 5, 0)], [(0, 10)])) == []
    run = Run("file", 100, 100 + 5 * MB, in_scratch=False)
    run.cut(2 * MB)
    assert [(s.start, s.stop) for s in run.segments] == [
        (100, 100 + 2 * MB), (100 + 2 * MB, 100 + 4 * MB), (100 + 4 * MB, 100 + 5 * MB),
    ]  # fmt: skip
    assert run.between(100 + 2 * MB, 100 + 2 * MB + 1) == [run.segments[1]]
    assert run.between(100, 100 + 2 * MB) == [run.segments[0]]
    assert run.between(101, 100 + 2 * MB + 1) == run.segments[:2]
