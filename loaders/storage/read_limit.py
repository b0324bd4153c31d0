"""A limit to the bytes a second that this process reads of weights, so that a shared source is left room for others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from loaders.storage.settings import current


class Bucket:
    """A token bucket: who takes bytes waits until those that were taken before have had their time.

    It holds no reserve, so that no stretch of time has more than the limit and one read.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._now, self._sleep = now, sleep
        self._lock = threading.Lock()
        self._free_s = 0.0  # when what was taken has had its time

    def take(self, size: int, limit: float) -> None:
        """Take bytes, at `limit` bytes a second; any thread may. Those that wait are served in turn."""
        with self._lock:
            begins = max(self._now(), self._free_s)
            self._free_s = begins + size / limit
            wait_s = begins - self._now()
        if wait_s > 0:
            self._sleep(wait_s)


_bucket = Bucket()  # one for the process


def is_limited() -> bool:
    """Whether the settings of this process limit what it reads."""
    return current().read_limit is not None


def before_reading(size: int) -> None:
    """Wait until bytes may be read, if there is a limit."""
    limit = current().read_limit
    if limit is not None:
        _bucket.take(size, limit)
