"""The number of threads that should read, which is measured while they read.

It begins with the fewest that make sense, and doubles as long as bytes come at least a tenth faster; then it goes back
to the best. Where the consumer of the bytes is the slower side, more threads bring nothing, and few are kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

BETTER = 1.1  # how much faster more threads must be: less would be within the noise of a disk
# A lap, after which a rate is taken, lasts for at least so many bytes and seconds. Shorter laps measure noise; longer
# ones keep a poor number of threads for longer.
LAP_BYTES = 64 << 20
LAP_S = 0.05


class Workers:
    """A gate that lets at most `limit` threads read at once, and finds the limit between `fewest` and `most`."""

    def __init__(self, fewest: int, most: int, *, adaptive: bool = True) -> None:
        self.limit = fewest if adaptive else most
        self.most = most
        self.rates: dict[int, float] = {}  # GB/s, by the number of threads
        self._is_settled = not adaptive or fewest >= most
        self._busy = 0
        self._bytes = 0
        self._began: float | None = None
        self._changed = threading.Condition()

    @contextmanager
    def reading(self, size: int) -> Iterator[None]:
        """Wait for a place among the readers, and hold it while `size` bytes are read."""
        with self._changed:
            while self._busy >= self.limit:
                self._changed.wait()
            self._busy += 1
            if self._began is None:
                self._began = time.perf_counter()
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._bytes += size
                self._look()
                self._changed.notify()

    def _look(self) -> None:
        """Record the rate of a lap that is over, and adapt the limit; do nothing within a lap."""
        assert self._began is not None
        now = time.perf_counter()
        if self._is_settled or self._bytes < LAP_BYTES or now - self._began < LAP_S:
            return
        self.rates[self.limit] = self._bytes / (now - self._began) / 1e9
        best = max((n for n in self.rates if n != self.limit), key=self.rates.__getitem__, default=None)
        if best is not None and self.rates[self.limit] < BETTER * self.rates[best]:
            self.limit, self._is_settled = best, True
        elif self.limit >= self.most:
            self._is_settled = True
        else:
            self.limit = min(self.most, self.limit * 2)
            self._changed.notify_all()
        self._bytes, self._began = 0, now

    def __str__(self) -> str:
        measured = ", ".join(f"{n}: {rate:.2g} GB/s" for n, rate in self.rates.items())
        return f"{self.limit} threads" + (f" (measured {measured})" if measured else "")
