"""Attempts at units, each submitted as a Ray task whose messages are a stream."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobs.execution.cluster import OnBytes, Task, UnitFailed
from jobs.execution.ray.worker import run_remotely
from loaders.storage.traffic import traffic

if TYPE_CHECKING:
    from jobs.execution.ray.placement import Spot

# Retries of a task whose worker died: enough for preempted machines, and few enough that a task which kills its worker,
# by too much memory for instance, fails soon.
WORKER_DEATHS = 3
STOP_S = 10.0  # seconds that units get to remove their part files before they are killed
WORKERS = "(workers)"  # stands for a host in the count of what all workers have moved


class Flight:
    """One submitted attempt at a task."""

    def __init__(self, task: Task[Any], spot: Spot, stream: Any) -> None:
        self.task = task
        self.spot = spot
        self.stream = stream
        self.launched_s = time.monotonic()
        self.node: str | None = None
        self.counted = 0


class Flights:
    """All submitted attempts, by their streams of messages."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._flights: list[Flight] = []
        self._remote = ray.remote(run_remotely)

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def by_node(self) -> Counter[str]:
        return Counter(flight.spot.node for flight in self._flights)

    def launch(self, task: Task[Any], spot: Spot) -> None:
        options = {"name": task.unit.id, "num_returns": "streaming", "max_retries": WORKER_DEATHS, **spot.options}
        stream = self._remote.options(**options).remote(spot.task(task), spot.settings)
        self._flights.append(Flight(task, spot, stream))

    def advance(self, on_bytes: OnBytes) -> Iterator[tuple[str, Any]]:
        """Wait up to a second for messages, count bytes, and yield the outcomes among the messages."""
        if not self._flights:
            time.sleep(0.1)
            return
        by_stream = {flight.stream: flight for flight in self._flights}
        ready, _ = self._ray.wait(list(by_stream), num_returns=1, timeout=1.0, fetch_local=False)
        for stream in ready:
            flight = by_stream[stream]
            outcome = self._message(flight, on_bytes)
            if outcome is not None:
                self._flights.remove(flight)
                yield flight.task.unit.id, outcome

    def _message(self, flight: Flight, on_bytes: OnBytes) -> Any | None:
        try:
            kind, value = self._ray.get(next(flight.stream))
        except StopIteration:
            return UnitFailed(flight.task.unit.id, "its worker ended without a report")
        except self._ray.exceptions.RayError as error:
            on_bytes(-flight.counted)
            return UnitFailed(flight.task.unit.id, said_by_ray(error))
        if kind == "node":
            # Ray has retried the task, which counts all bytes again.
            on_bytes(-flight.counted)
            flight.node, flight.counted = value, 0
        elif kind == "moved":
            traffic(WORKERS).moved(**value)
        elif kind == "bytes":
            flight.counted += value
            on_bytes(value)
        else:
            return value
        return None

    def forget(self, unit: str) -> None:
        """Cancel other attempts at a unit that has finished."""
        for flight in [f for f in self._flights if f.task.unit.id == unit]:
            self._cancel(flight, force=False)
            self._flights.remove(flight)

    def lost(self, dead: dict[str, float]) -> list[Task[Any]]:
        """Cancel the attempts on dead machines, and those that may be stuck on the way to one; returns their tasks.

        A flight without a node has not reported where it runs; if it was submitted before a machine died, it may have
        been sent there.
        """
        if not dead:
            return []
        latest = max(dead.values())
        gone = [f for f in self._flights if f.node in dead or (f.node is None and f.launched_s < latest)]
        for flight in gone:
            self._cancel(flight, force=True)
            self._flights.remove(flight)
        return [flight.task for flight in gone]

    def cancel(self) -> None:
        """Ask all attempts to stop, wait until they have removed their part files, then kill those that are left."""
        for flight in self._flights:
            self._cancel(flight, force=False)
        deadline = time.monotonic() + STOP_S
        for flight in self._flights:
            # The stream of a cancelled task ends in one of several errors; any of them means that it has stopped.
            with contextlib.suppress(Exception):
                while time.monotonic() < deadline:
                    self._ray.get(flight.stream._next_sync(timeout_s=deadline - time.monotonic()))
            self._cancel(flight, force=True)
        self._flights.clear()

    def _cancel(self, flight: Flight, *, force: bool) -> None:
        # The attempt has ended by itself, or its machine is gone.
        with contextlib.suppress(Exception):
            self._ray.cancel(flight.stream, force=force)


def said_by_ray(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
