"""Threads that share work: ranges first, then the next tensor; results in order; errors and stops end all of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from loaders.backends import kernels_of, threads
from loaders.backends.threads import Crew, Stopped, ThreadedWork

WAIT_S = 20  # seconds until a test that would hang fails instead


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setattr(threads, "RANGE", 10)
    with Crew(2) as made:
        yield made


@pytest.fixture
def work(crew: Crew) -> ThreadedWork:
    return ThreadedWork(kernels_of("cpu"), crew, threading.Event())


def test_results_are_in_the_order_of_ranges_and_items(work: ThreadedWork) -> None:
    assert work.sweep(25, 4, lambda start, stop: (start, stop)) == [(0, 12), (12, 24), (24, 25)]
    assert work.each(range(9), lambda item: work.sweep(item, 1, lambda _, stop: stop)) == [
        [min(at + 10, item) for at in range(0, item, 10)] for item in range(9)
    ]


def test_all_threads_work_on_the_ranges_of_one_tensor(work: ThreadedWork) -> None:
    together = threading.Barrier(2, timeout=WAIT_S)
    work.each(["tensor"], lambda _: work.sweep(20, 1, lambda start, stop: together.wait()))


def test_a_thread_without_a_range_opens_the_next_tensor(work: ThreadedWork) -> None:
    """The first tensor has one range, which waits until the second tensor is open: no barrier stands between them."""
    is_open = threading.Event()

    def tensor(name: str) -> None:
        if name == "second":
            is_open.set()
        work.sweep(10, 1, lambda start, stop: is_open.wait(WAIT_S))

    work.each(["first", "second"], tensor)
    assert is_open.is_set()


def test_pieces_of_work_share_a_crew(crew: Crew) -> None:
    """Two units at once on one crew: each finishes, however the other's tensors lie in the queue."""
    found: dict[int, list[int]] = {}

    def unit(number: int) -> None:
        own = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
        found[number] = own.each(range(20), lambda item: sum(own.sweep(35, 1, lambda start, stop: item)))

    units = [threading.Thread(target=unit, args=(number,)) for number in range(4)]
    for each in units:
        each.start()
    for each in units:
        each.join(WAIT_S)
    assert found == {number: [4 * item for item in range(20)] for number in range(4)}


def test_an_error_is_raised_after_what_runs_has_ended_and_nothing_else_is_begun(work: ThreadedWork) -> None:
    begun, ended = [], []

    def tensor(item: int) -> None:
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        ended.append(item)

    with pytest.raises(ValueError, match="three"):
        work.each(range(1000), tensor)
    assert len(begun) < 1000
    assert len(ended) == len(begun) - 1


def test_the_first_error_in_order_is_raised(work: ThreadedWork) -> None:
    together = threading.Barrier(2, timeout=WAIT_S)

    def fail(start: int, stop: int) -> None:
        together.wait()
        raise ValueError(str(start))

    with pytest.raises(ValueError, match="^0$"):
        work.sweep(20, 1, fail)


def test_a_stop_ends_the_work(crew: Crew) -> None:
    stop = threading.Event()
    work = ThreadedWork(kernels_of("cpu"), crew, stop)
    with pytest.raises(Stopped):
        work.each(range(1000), lambda item: stop.set())


def test_a_sweep_inside_of_a_range_runs_on_its_thread(work: ThreadedWork) -> None:
    def body(start: int, stop: int) -> set[str]:
        return set(work.sweep(30, 1, lambda *_: threading.current_thread().name))

    assert all(len(names) == 1 for names in work.sweep(40, 1, body))
