"""Thread seconds by phase of the work: reading, encoding, measuring, writing, uploading."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

PHASES = ("read", "encode", "measure", "write", "upload")


class Clock:
    """A sum of the seconds that threads spend in each phase.

    A phase inside another counts as itself alone: a range is read, and what came out is written, while it is encoded.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._threads: list[_Spent] = []

    def phase(self, name: str) -> Phase:
        """Return a context that adds the time inside it to a phase."""
        spent: _Spent | None = getattr(self._own, "spent", None)
        if spent is None:
            # Sums of a thread's own, so that threads do not wait for each other; appending is atomic.
            spent = self._own.spent = _Spent()
            self._threads.append(spent)
        return Phase(spent, name)

    def seconds(self) -> Mapping[str, float]:
        """Return thread seconds as read_s, encode_s, measure_s, write_s, upload_s."""
        return {f"{name}_s": sum(each.by_phase[name] for each in self._threads) for name in PHASES}


class _Spent:
    """The seconds of one thread."""

    def __init__(self) -> None:
        self.by_phase = dict.fromkeys(PHASES, 0.0)
        self.inside = 0.0  # seconds of the phases inside the one that is open


class Phase:
    """The context of one piece of a phase. It is entered thousands of times a second, so it is no generator."""

    __slots__ = ("_began", "_name", "_outside", "_spent")

    def __init__(self, spent: _Spent, name: str) -> None:
        self._spent = spent
        self._name = name

    def __enter__(self) -> None:
        self._outside, self._spent.inside = self._spent.inside, 0.0
        self._began = time.perf_counter()

    def __exit__(self, *of_an_error: object) -> None:
        took, spent = time.perf_counter() - self._began, self._spent
        spent.by_phase[self._name] += took - spent.inside
        spent.inside = self._outside + took
