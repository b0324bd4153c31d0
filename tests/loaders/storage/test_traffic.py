"""The limit of requests in flight: what it adapts to. Time is a number here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from loaders.storage.settings import StoreSettings, current, use
from loaders.storage.traffic import FIRST_LIMIT, Traffic

pytestmark = pytest.mark.quick


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def at_most_32() -> Iterator[None]:
    before = current()
    use(StoreSettings(at_once=32))
    yield
    use(before)


def work(traffic: Traffic, clock: Clock, rate: Callable[[int], float], seconds: float) -> None:
    """Keep as many requests in flight as allowed, while together they bring `rate` bytes a second."""
    end = clock.now + seconds
    with ExitStack() as stack:
        flying: list[ExitStack] = []
        while clock.now < end:
            while len(flying) < traffic.limit:
                flying.append(stack.enter_context(ExitStack()))
                flying[-1].enter_context(traffic.request())
            clock.now += 0.1
            traffic.moved(fetched=int(rate(len(flying)) * 0.1))
            flying.pop(0).close()


def test_it_grows_while_more_requests_bring_more(clock: Clock) -> None:
    traffic = Traffic(clock)
    assert traffic.limit == FIRST_LIMIT
    work(traffic, clock, lambda count: count * 1e6, 60)
    assert traffic.limit == 32


def test_it_stays_where_more_bring_nothing(clock: Clock) -> None:
    traffic = Traffic(clock)
    work(traffic, clock, lambda count: min(count, 12) * 1e6, 300)
    assert 10 <= traffic.limit <= 20


def test_it_is_halved_once_for_all_that_were_under_way(clock: Clock) -> None:
    traffic = Traffic(clock)
    for _ in range(5):
        traffic.busy()
    assert traffic.limit == FIRST_LIMIT // 2
    clock.now += 2
    traffic.busy()
    assert traffic.limit == FIRST_LIMIT // 4
    for _ in range(10):
        clock.now += 2
        traffic.busy()
    assert traffic.limit == 1
    work(traffic, clock, lambda count: count * 1e6, 5)
    assert traffic.limit == 1  # it waits for a while
    work(traffic, clock, lambda count: count * 1e6, 60)
    assert traffic.limit > 8


def test_few_requests_say_nothing(clock: Clock) -> None:
    traffic = Traffic(clock)
    for _ in range(1000):
        with traffic.request():
            clock.now += 1
            traffic.moved(fetched=10**9)
    assert traffic.limit == FIRST_LIMIT


def test_no_more_than_the_limit_are_in_flight() -> None:
    use(StoreSettings(at_once=3))
    traffic, inside, most = Traffic(), list[int](), list[int]()
    go_on = threading.Event()

    def request() -> None:
        with traffic.request():
            inside.append(1)
            most.append(len(inside))
            if len(inside) == 3:
                go_on.set()
            go_on.wait(5)
            inside.pop()

    threads = [threading.Thread(target=request) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 3
