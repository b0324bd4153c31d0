"""Requests of this process to stores: how many are in flight, which adapts to what the store gives, and their bytes.

All requests that move bytes go through `traffic(host)`. The limit grows while all of it is in use and requests succeed,
and is halved when the store says that it is asked for too much (additive increase, multiplicative decrease: Chiu and
Jain, "Analysis of the Increase and Decrease Algorithms for Congestion Avoidance", 1989).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from loaders.storage.settings import current

FIRST_LIMIT = 8
CALM_S = 1.0  # requests that were under way when the limit was halved do not halve it again


class Traffic:
    """The requests of this process to one host."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._limit = float(FIRST_LIMIT)
        self._in_flight = 0
        self._halved_at = -CALM_S
        self.fetched = 0  # bytes
        self.uploaded = 0

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        return max(1, min(int(self._limit), current().at_once))

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wait until a request may be sent, and count it while the block runs; success lets the limit grow."""
        with self._free:
            self._free.wait_for(lambda: self._in_flight < self.limit)
            self._in_flight += 1
            was_full = self._in_flight >= self.limit
        try:
            yield
            if was_full:
                with self._free:
                    self._limit = min(self._limit + 1 / self.limit, current().at_once)
        finally:
            with self._free:
                self._in_flight -= 1
                self._free.notify()

    def busy(self) -> None:
        """Note that the store was asked for too much (429, 503, a timeout)."""
        with self._free:
            if time.monotonic() - self._halved_at >= CALM_S:
                self._limit = max(1.0, self._limit / 2)
                self._halved_at = time.monotonic()

    def moved(self, *, fetched: int = 0, uploaded: int = 0) -> None:
        """Count bytes."""
        with self._free:
            self.fetched += fetched
            self.uploaded += uploaded


@cache
def traffic(host: str) -> Traffic:
    """Return the traffic of this process to a host."""
    return Traffic()
