"""How fast attempts at units are: from that, which one is stuck, and which one would be overtaken by a second.

What counts is progress, not life: a process whose device hangs, or whose folder is on a server that is gone, lives on.
A range is what one thread encodes in one go, of `RANGE` weights, and the smallest piece of work that is told. All
threads of a unit work on ranges of their own, so the time from one told range to the next is at most that of one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from loaders.backends.threads import RANGE

# An attempt is stuck if it has made no progress for so many times the time of a range, and at least for STUCK_S. That
# leaves room for a disk that is busy, a pause of a store, and a message that is late.
TIMES = 20
STUCK_S = 15.0
# Before its first bytes, an attempt starts a worker, imports libraries, compiles kernels and opens the source. The same
# time is granted to what compiles later.
FIRST_S = 60.0
# At the end of a unit its files are synced, uploaded or read back. Then it may be silent for as long as it has taken.
END_S = 60.0
RANGE_BYTES = 4 * RANGE  # of weights as they are decoded, at most
# A unit is run a second time at the end if the first attempt has taken SLOW times what is usual, and still needs a
# usual time, so that a second one, which begins from nothing, is likely to be done before it.
SLOW = 1.5
SHORTEST_S = 3.0  # what takes less is not worth a second attempt
KEPT = 101  # of the last units, whose median is taken


@dataclass(slots=True)
class Progress:
    """The progress of one attempt at one unit, by the driver's clock (time.monotonic)."""

    since_s: float
    work_bytes: int
    done_bytes: int = 0
    first_s: float | None = None  # when its first bytes were told
    moved_s: float = 0.0  # when it last moved
    is_compiling: bool = False

    def moved(self, size: int, now: float) -> None:
        """Note work bytes; a negative size if the attempt begins again."""
        self.done_bytes += size
        self.is_compiling = False
        self.moved_s = now
        if self.first_s is None and size > 0:
            self.first_s = now

    @property
    def is_at_end(self) -> bool:
        return self.done_bytes >= self.work_bytes

    @property
    def rate(self) -> float | None:
        """Bytes a second since it began, until it last moved."""
        took = self.moved_s - self.since_s
        return self.done_bytes / took if self.done_bytes > 0 and took > 0 else None


class Pace:
    """What is known of the speed of units."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._costs: deque[float] = deque(maxlen=KEPT)  # seconds a byte of the last units
        self._slowest_first_s = 0.0

    def first(self, took_s: float) -> None:
        """Note how long an attempt took until its first bytes."""
        self._slowest_first_s = max(self._slowest_first_s, took_s)

    def ended(self, work_bytes: int, took_s: float) -> None:
        """Note a finished unit."""
        if work_bytes:
            self._costs.append(took_s / work_bytes)

    def usual_s(self, work_bytes: int) -> float | None:
        """Return the seconds that a unit usually takes; None while no unit is finished."""
        return median(self._costs) * work_bytes if self._costs else None

    def patience_s(self, attempt: Progress) -> float:
        """Return for how many seconds an attempt may make no progress before it counts as stuck."""
        if attempt.first_s is None or attempt.is_compiling:
            return max(FIRST_S, 2 * self._slowest_first_s)
        if attempt.is_at_end:
            return max(END_S, attempt.moved_s - attempt.since_s)
        range_s = RANGE_BYTES / attempt.rate if attempt.rate else self.usual_s(RANGE_BYTES) or 1.0
        return max(STUCK_S, TIMES * self._threads * range_s)

    def is_stuck(self, attempt: Progress, now: float) -> bool:
        return now - max(attempt.moved_s, attempt.since_s) > self.patience_s(attempt)

    def left_s(self, attempt: Progress, now: float) -> float | None:
        """Return the seconds that an attempt still needs, at its own rate, if it is worth a second one; else None."""
        usual = self.usual_s(attempt.work_bytes)
        if usual is None or now - attempt.since_s < max(SHORTEST_S, SLOW * usual):
            return None
        done, took = attempt.done_bytes, now - attempt.since_s
        left = took * (attempt.work_bytes - done) / done if done > 0 else float("inf")
        return left if left > max(SHORTEST_S, usual) else None
