"""What flies, where and since when: for the display, the journal's sign of life, and MLflow. Any thread may tell it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

How = Literal["done", "failed", "again"]  # again: this attempt ended, and the unit is tried once more


@dataclass(slots=True)
class Flying:
    """One attempt at a unit: on which machine, since when (time.monotonic), and the bytes that it has done."""

    unit: str
    node: str
    since_s: float
    done_bytes: int = 0
    moved_s: float = 0.0  # when it last did any


class Live:
    """The attempts that fly, and counts of those that have ended, by machine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flying: dict[tuple[str, str], Flying] = {}
        self.done: Counter[str] = Counter()  # units by machine
        self.bytes: Counter[str] = Counter()  # work bytes by machine
        self.again: Counter[str] = Counter()  # attempts that were repeated, by machine
        self.failed: dict[str, str] = {}  # reasons by unit

    def launched(self, unit: str, node: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._flying[unit, node] = Flying(unit, node, now, moved_s=now)

    def moved(self, unit: str, node: str, size: int) -> None:
        """Count work bytes; negative if an attempt begins again."""
        with self._lock:
            self.bytes[node] += size
            if (flying := self._flying.get((unit, node))) is not None:
                flying.done_bytes += size
                flying.moved_s = time.monotonic()

    def ended(self, unit: str, node: str, how: How, why: str = "") -> None:
        with self._lock:
            self._flying.pop((unit, node), None)
            if how == "done":
                self.done[node] += 1
            elif how == "again":
                self.again[node] += 1
            else:
                self.failed[unit] = why

    @contextmanager
    def flying(self) -> Iterator[list[Flying]]:
        """The attempts that fly, which do not change inside the block."""
        with self._lock:
            yield list(self._flying.values())
