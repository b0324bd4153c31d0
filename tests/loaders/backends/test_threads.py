"""Threads that share work: ranges first, then the next tensor; results in order; errors and stops end all of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def crew_is_busy(crew: Crew) -> Iterator[None]:
    """Hold all threads of a crew inside the context."""
    free = threading.Event()
    held = [crew.submit(free.wait, WAIT_S) for _ in range(crew.threads)]
    try:
        yield
    finally:
        free.set()
        for each in held:
            each.result()


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


def test_threads_spread_over_the_pieces_of_work(crew: Crew) -> None:
    """Two units with a thread each: neither has to wait until the other has no tensor left."""
    together = threading.Barrier(2, timeout=WAIT_S)
    units = [ThreadedWork(kernels_of("cpu"), crew, threading.Event()) for _ in range(2)]
    begun = threading.Barrier(2, timeout=WAIT_S)
    failed: list[BaseException] = []

    def run(unit: ThreadedWork) -> None:
        def tensor(number: int) -> None:
            if number == 1:
                together.wait()

        begun.wait()
        try:
            unit.each(range(3), tensor)
        except threading.BrokenBarrierError as error:
            failed.append(error)

    # Threads that are busy while both units begin find both when they are free.
    with crew_is_busy(crew):
        callers = [threading.Thread(target=run, args=(unit,)) for unit in units]
        for each in callers:
            each.start()
        while len(crew._works) < 2:
            time.sleep(0.001)
    for each in callers:
        each.join(WAIT_S)
    assert not failed


def test_calls_of_one_piece_of_work_from_several_threads(work: ThreadedWork) -> None:
    """A model's weights are asked for by whoever needs them: a call that ends must not end what serves another."""
    slow, done = threading.Event(), threading.Event()

    def wait(start: int, stop: int) -> bool:
        return slow.wait(WAIT_S)

    other = threading.Thread(target=lambda: (work.sweep(100, 1, wait), done.set()))
    other.start()
    while not work._open.helpers:
        time.sleep(0.001)
    slow.set()
    work.sweep(20, 1, lambda start, stop: stop)
    other.join(WAIT_S)
    assert done.is_set()


def test_a_thread_of_the_crew_may_ask_for_other_work_of_it(crew: Crew) -> None:
    """All threads at once: none of them is free to do what they ask for."""
    outer, inner = (ThreadedWork(kernels_of("cpu"), crew, threading.Event()) for _ in range(2))
    together = threading.Barrier(2, timeout=WAIT_S)

    def tensor(number: int) -> list[int]:
        together.wait()
        return inner.sweep(30, 1, lambda start, stop: stop)

    assert outer.each(range(2), tensor) == [[10, 20, 30]] * 2


@pytest.mark.parametrize("count", [1, 2])
def test_items_inside_of_items_and_of_ranges(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "RANGE", 10)
    with Crew(count) as crew:
        work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
        assert work.each(range(4), lambda i: sum(work.each(range(4), lambda k: i * k))) == [0, 6, 12, 18]
        assert work.sweep(30, 1, lambda start, stop: work.each([stop], lambda each: each)) == [[10], [20], [30]]


def test_a_crew_keeps_no_calls_that_nobody_waits_for(crew: Crew, work: ThreadedWork) -> None:
    """A model has tens of thousands of tensors, and each sweep of theirs wakes threads."""
    work.each(range(500), lambda _: work.sweep(100, 1, lambda start, stop: None))
    assert crew._awake <= crew.threads
    assert crew._work_queue.qsize() <= crew.threads


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
