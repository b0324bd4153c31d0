"""Thread seconds by phase of the work: reading, encoding, measuring, writing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PHASES = ("read", "reread", "encode", "measure", "write", "finish")


class Clock:
    """A sum of the seconds that threads spend in each phase.

    Reading and writing happen inside encoding and measuring, so they are counted apart and subtracted. Reads count as
    "read" while a tensor is encoded and as "reread" while it is measured; writes count as "write" while tensors are
    written and as "finish" while files are completed.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, threads: int = 1) -> Iterator[None]:
        """Add the time of the block to a phase, `threads` times if so many threads work in it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = (time.perf_counter() - began) * threads
            with self._lock:
                self._seconds[name] += spent

    def seconds(self) -> Mapping[str, float]:
        """Return thread seconds as read_s, encode_s, measure_s, write_s; the last three exclude what is inside them."""
        spent = self._seconds
        # Threads of the encoder may wait for one reader together, so the time inside can exceed the time around it.
        return {
            "read_s": spent["read"] + spent["reread"],
            "encode_s": max(0.0, spent["encode"] - spent["read"] - spent["write"]),
            "measure_s": max(0.0, spent["measure"] - spent["reread"]),
            "write_s": spent["write"] + spent["finish"],
        }
