"""Requests of this process to stores: how many are in flight, which adapts to what the store gives, and their bytes.

All requests that move bytes go through `traffic(host)`. The limit is raised while more requests bring more bytes a
second, goes back where they do not, and is halved when the store says that it is asked for too much (additive increase,
multiplicative decrease: Chiu and Jain, "Analysis of the Increase and Decrease Algorithms for Congestion Avoidance",
1989).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from loaders.storage.settings import current

FIRST_LIMIT = 8
CALM_S = 1.0  # requests that were under way when the limit was halved do not halve it again
WINDOW_S = 0.5  # a rate is taken over so many seconds at least, and over as many requests as may be in flight
GAIN = 1.05  # a rate that is not higher by this factor is the same, as rates of shared networks go
HOLD_S = 10.0  # seconds before the limit is raised again after that brought nothing, or it was halved


class Traffic:
    """The requests of this process to one host."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._free = threading.Condition()
        self._limit = float(FIRST_LIMIT)
        self._in_flight = 0
        self._halved_at = -CALM_S
        self._window: _Window | None = None
        self._best = 0.0, float(FIRST_LIMIT)  # the highest rate, in bytes a second, and its limit
        self._held_until = 0.0
        self.fetched = 0  # bytes
        self.uploaded = 0
        self.was_reached = False  # whether the host ever answered

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        return max(1, min(int(self._limit), current().at_once))

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wait until a request may be sent, and count it while the block runs."""
        with self._free:
            self._free.wait_for(lambda: self._in_flight < self.limit)
            self._in_flight += 1
            if self._in_flight >= self.limit and self._window is None:
                self._window = _Window(self._now(), self.fetched + self.uploaded)
        try:
            yield
        finally:
            with self._free:
                self._ended()
                self._in_flight -= 1
                # As the limit may have been raised, there may be room for several.
                self._free.notify(max(1, self.limit - self._in_flight))

    def _ended(self) -> None:
        """Count a request that ended, and look whether the limit should change. A rate says something of a limit only
        while as many requests are in flight as it allows.
        """
        window = self._window
        if window is None:
            return
        # One less: the request that takes the place of the one that ended before has yet to be sent.
        if self._in_flight < self.limit - 1:
            self._window = None
            return
        window.requests += 1
        took = self._now() - window.began
        if took >= WINDOW_S and window.requests >= self.limit:
            self._learn((self.fetched + self.uploaded - window.bytes) / took)
            self._window = None

    def _learn(self, rate: float) -> None:
        """Change the limit by the rate that it has given."""
        best, its_limit = self._best
        is_held = self._now() < self._held_until
        if rate <= best * GAIN and self._limit > its_limit:
            self._limit = its_limit
            self._held_until = self._now() + HOLD_S
        elif rate > best * GAIN or not is_held:
            self._best = rate, self._limit  # after a while, what the network gives now, which may be less than once
            if not is_held:
                self._limit = min(self._limit * 1.25 + 1, float(max(1, current().at_once)))

    def reached(self) -> None:
        """Note that the host answered."""
        self.was_reached = True

    def busy(self) -> None:
        """Note that the store was asked for too much (429, 503, a timeout)."""
        with self._free:
            if self._now() - self._halved_at >= CALM_S:
                self._limit = max(1.0, self._limit / 2)
                self._halved_at = self._now()
                self._best, self._window = (0.0, self._limit), None
                self._held_until = self._now() + HOLD_S

    def moved(self, *, fetched: int = 0, uploaded: int = 0) -> None:
        """Count bytes."""
        with self._free:
            self.fetched += fetched
            self.uploaded += uploaded


class _Window:
    """A stretch of time in which as many requests were in flight as allowed."""

    def __init__(self, began: float, moved: int) -> None:
        self.began = began
        self.bytes = moved  # of the host, when it began
        self.requests = 0  # that ended


_hosts: dict[str, Traffic] = {}
_lock = threading.Lock()


def traffic(host: str) -> Traffic:
    """Return the traffic of this process to a host."""
    with _lock:
        return _hosts.setdefault(host, Traffic())


def moved_bytes() -> Mapping[str, int]:
    """Return the bytes that this process has moved, from and to all hosts: `fetched` and `uploaded`."""
    with _lock:
        all_hosts = list(_hosts.values())
    return {"fetched": sum(t.fetched for t in all_hosts), "uploaded": sum(t.uploaded for t in all_hosts)}
