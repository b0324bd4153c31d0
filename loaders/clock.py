"""Seconds by phase, summed over the threads that spend them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PHASES = ("read", "reread", "encode", "measure", "write", "finish")


class Clock:
    """Adds up what threads spend in each phase.

    Reading and writing happen inside encoding and measuring: views count as "read" while a tensor is encoded and as
    "reread" while it is measured, files as "write" while they are written and as "finish" while they are made whole.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, threads: int = 1) -> Iterator[None]:
        """Count a block's time, once for each of the `threads` at work in it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = (time.perf_counter() - began) * threads
            with self._lock:
                self._seconds[name] += spent

    def seconds(self) -> Mapping[str, float]:
        """read_s, encode_s, measure_s, write_s: encoding and measuring without the reading and writing inside them."""
        spent = self._seconds
        return {
            "read_s": spent["read"] + spent["reread"],
            "encode_s": max(0.0, spent["encode"] - spent["read"] - spent["write"]),
            "measure_s": max(0.0, spent["measure"] - spent["reread"]),
            "write_s": spent["write"] + spent["finish"],
        }
