"""Trying again what failed in passing. Time is a number here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loaders.errors import StorageError
from loaders.storage import patience
from loaders.storage.patience import UNREACHED_S, Passing, patiently
from loaders.storage.traffic import Traffic

pytestmark = pytest.mark.quick


class Clock:
    """A clock that stands still but for pauses."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, pause_s: float) -> None:
        self.now += pause_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(patience, "time", made)
    return made


def failing(failure: Passing, *, until: Callable[[], bool] = lambda: False) -> Callable[[], str]:
    def call() -> str:
        if not until():
            raise failure
        return "done"

    return call


def test_a_host_that_never_answered_is_given_up_soon(clock: Clock) -> None:
    unreached = failing(Passing("no such host", is_unreached=True))
    with pytest.raises(StorageError, match=r"asking: no such host; tried \d+ times in \d+ s: look at the cable"):
        patiently("asking", unreached, Traffic(), patience_s=300, if_unreached="look at the cable", sleep=clock.sleep)
    assert clock.now - 1000 <= UNREACHED_S


def test_a_host_that_answered_once_is_waited_for(clock: Clock) -> None:
    traffic = Traffic()
    assert patiently("asking", lambda: "yes", traffic) == "yes"
    back = failing(Passing("no such host", is_unreached=True), until=lambda: clock.now > 1200)
    assert patiently("asking", back, traffic, patience_s=300, sleep=clock.sleep) == "done"
    with pytest.raises(StorageError, match="run the same command again later"):
        patiently("asking", failing(Passing("no", is_unreached=True)), traffic, patience_s=300, sleep=clock.sleep)


def test_a_host_that_is_busy_has_answered(clock: Clock) -> None:
    traffic = Traffic()
    busy = failing(Passing("503", is_busy=True), until=lambda: clock.now > 1200)
    assert patiently("asking", busy, traffic, patience_s=300, sleep=clock.sleep) == "done"
    assert traffic.limit < Traffic().limit


def test_the_pause_that_a_server_asks_for_is_kept(clock: Clock) -> None:
    asked = failing(Passing("429", pause_s=100), until=lambda: clock.now >= 1100)
    assert patiently("asking", asked, Traffic(), patience_s=150, sleep=clock.sleep) == "done"
    assert clock.now < 1200
    with pytest.raises(StorageError, match="429; tried 1 times"):
        patiently("asking", failing(Passing("429", pause_s=100)), Traffic(), patience_s=50, sleep=clock.sleep)
