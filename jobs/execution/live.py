"""What flies, where and since when: for the display, the journal's sign of life, and MLflow. Any thread may tell it."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from jobs.output.life import MOST, MOST_FAILED, FlyingUnit, MachineSeen, Seen

# again: this attempt ended, and the unit is tried once more; stopped: the job was
How = Literal["done", "failed", "again", "stopped"]
RECENT_S = 10  # seconds over which the rate of now is taken: longer than a worker needs between two messages


@dataclass(slots=True)
class Flying:
    """One attempt at a unit: on which machine, since when (time.monotonic), and the bytes that it has done."""

    unit: str
    node: str
    since_s: float
    done_bytes: int = 0
    moved_s: float = 0.0  # when it last did any


class Live:
    """The attempts that fly, and counts of those that have ended, by machine, since the work began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.begin("", 0, 0)

    def begin(self, doing: str, units: int, work_bytes: int) -> None:
        """Begin to count anew, for work of so many units and bytes."""
        with self._lock:
            self._doing, self._units, self._work_bytes, self._began_s = doing, units, work_bytes, time.monotonic()
            self._flying: dict[tuple[str, str], Flying] = {}
            self._recent: deque[tuple[int, Counter[str]]] = deque()  # bytes by machine, second by second
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
        now = time.monotonic()
        with self._lock:
            self.bytes[node] += size
            if not self._recent or self._recent[-1][0] != int(now):
                self._recent.append((int(now), Counter()))
                self._forget(now)
            self._recent[-1][1][node] += size
            if (flying := self._flying.get((unit, node))) is not None:
                flying.done_bytes += size
                flying.moved_s = now

    def ended(self, unit: str, node: str, how: How, why: str = "") -> None:
        with self._lock:
            self._flying.pop((unit, node), None)
            if how == "done":
                self.done[node] += 1
            elif how == "again":
                self.again[node] += 1
            elif how == "failed":
                self.failed[unit] = why

    def repeated(self, node: str) -> None:
        """Count an attempt that goes on by itself after an error that passed."""
        with self._lock:
            self.again[node] += 1

    @contextmanager
    def flying(self) -> Iterator[list[Flying]]:
        """The attempts that fly, which do not change inside the block."""
        with self._lock:
            yield list(self._flying.values())

    def seen(self) -> Seen:
        """Return how it stands now; of many machines and units, those with the most bytes and the oldest."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            recent: Counter[str] = Counter()
            for _, moved in self._recent:
                recent.update(moved)
            spent = max(1.0, min(now - self._began_s, RECENT_S))
            aloft = Counter(flying.node for flying in self._flying.values())
            names = sorted({*self.done, *self.bytes, *self.again, *aloft})
            if len(names) > MOST:
                names = sorted(name for name, _ in self.bytes.most_common(MOST))
            machines = tuple(
                MachineSeen(
                    name=name, flying=aloft[name], done=self.done[name], retries=self.again[name],
                    bytes=self.bytes[name], bytes_per_s=max(0, recent[name]) / spent,
                )
                for name in names
            )  # fmt: skip
            oldest = sorted(self._flying.values(), key=lambda each: each.since_s)[:MOST]
            return Seen(
                doing=self._doing, seconds=now - self._began_s, units=self._units, done=self.done.total(),
                retries=self.again.total(), work_bytes=self._work_bytes, done_bytes=self.bytes.total(),
                bytes_per_s=max(0, recent.total()) / spent,
                failed=dict(islice(self.failed.items(), MOST_FAILED)), machines=machines,
                flying=tuple(
                    FlyingUnit(
                        unit=each.unit, machine=each.node, seconds=now - each.since_s, bytes=each.done_bytes,
                        still_s=now - each.moved_s,
                    )
                    for each in oldest
                ),
            )  # fmt: skip

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] <= now - RECENT_S - 1:
            self._recent.popleft()
