"""The tasks of a job that have not been launched, and which of them share a Ray task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jobs.execution.cluster import Task

# Small units share a Ray task, which costs some milliseconds: so many, of so many bytes of source.
MOST_UNITS, MOST_BYTES = 16, 64 << 20
SHARES = 2  # a machine's room gets at least so many Ray tasks of what is left, so that all end at about the same time


class Waiting:
    """Tasks in their order, those that take a GPU apart from others: each kind waits for room of its own."""

    def __init__(self, tasks: Sequence[Task[Any]] = ()) -> None:
        self._left: dict[int, list[Task[Any]]] = {}
        for task in reversed(tasks):
            self._left.setdefault(task.gpus, []).append(task)

    def __len__(self) -> int:
        return sum(map(len, self._left.values()))

    def next(self, room: int) -> Iterator[list[Task[Any]]]:
        """Yield, for each kind, the next tasks that share a Ray task, of which about `room` run at once. They stay."""
        for gpus in sorted(self._left, reverse=True):
            left, found, size = self._left[gpus], list[Task[Any]](), 0
            most = max(1, min(MOST_UNITS, len(left) // (SHARES * room)))
            for task in reversed(left[-most:]):
                size += task.unit.source_bytes
                if found and size > MOST_BYTES:
                    break
                found.append(task)
            if found:
                yield found

    def take(self, tasks: Sequence[Task[Any]]) -> None:
        """Remove what `next` has yielded."""
        del self._left[tasks[0].gpus][-len(tasks) :]
