"""Clocks that several threads add to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from loaders.quantization.scheme import Block, View


class Timer:
    """Seconds by phase, summed over threads."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(("read", "reread", "encode", "measure", "write", "finish"), 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str, weight: int = 1) -> Iterator[None]:
        """Count a block's time, `weight` times for so many threads at work in it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = (time.perf_counter() - began) * weight
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


class TimedView:
    """A view whose reading is timed."""

    def __init__(self, view: View, timer: Timer, phase: str) -> None:
        self.spec = view.spec
        self._view = view
        self._timer = timer
        self._phase = phase

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        with self._timer.phase(self._phase):
            return self._view.read(start, stop, slot)
