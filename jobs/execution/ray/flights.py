"""Attempts at units, each submitted as a Ray task whose messages are a stream."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.execution.cluster import Task
from jobs.execution.ray.pace import Progress
from jobs.execution.ray.processes import end_remotely
from jobs.execution.ray.worker import PROGRESS_S, Message, ask_remotely, run_remotely
from loaders.storage.settings import current

if TYPE_CHECKING:
    from jobs.execution.ray.placement import Spot

WORKERS = "(workers)"  # stands for a host in the count of what all workers have moved
STOP_S = 10.0  # seconds that units get to remove their part files before they are killed
GET_S = 1.0  # seconds to wait for a message that is announced; its machine may be gone by now
# With many streams, messages are taken in rounds, so that the cost of looking at all streams is shared by many of them.
PAUSE_S = 2e-5  # seconds between two rounds, for each stream
MESSAGES_A_SECOND = 400  # in all; with more attempts in flight, each tells its progress less often


class Flight:
    """One Ray task: attempts at some units, one after another, on one machine.

    `left` has the tasks without an outcome. `unit` is the one at work, and `progress` its progress, or before the first
    one that of the worker's start.
    """

    def __init__(self, tasks: Sequence[Task[Any]], spot: Spot, name: str, stream: Any) -> None:
        self.left = {task.unit.id: task for task in tasks}
        self.spot = spot
        self.name = name  # of the Ray task, by which its worker's process is found
        self.stream = stream
        self.first = tasks[0].unit.id
        self.unit: str | None = None
        self.progress = Progress(time.monotonic(), 0)
        self.silent_s = max(getattr(task, "silent_s", 0.0) for task in tasks)
        self.has_begun = False  # whether its worker was heard of
        self.is_short = False  # whether its machine had little memory left when it was last heard of
        self.is_stuck = False
        self.cancelled_s: float | None = None
        self.was_killed = False
        self.late: Any = None  # a message that was announced and has not come

    def begin(self, unit: str) -> None:
        self.unit = unit
        work_bytes = self.left[unit].work_bytes if unit in self.left else 0
        self.progress = Progress(time.monotonic(), work_bytes, silent_s=self.silent_s)

    @property
    def signal(self) -> Any:
        """What Ray is asked to wait for: the next message, or of a cancelled task its end.

        Its stream ends at once, and whoever takes the next message then waits for the task's end, however long.
        """
        return self.stream if self.cancelled_s is None else self.stream.completed()

    @property
    def is_lost(self) -> bool:
        """Whether it is not waited for: its outcome is no longer needed, or it is stuck."""
        return self.is_stuck or self.cancelled_s is not None


class Flights:
    """All submitted attempts."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._by_stream: dict[Any, Flight] = {}
        self._remote = ray.remote(run_remotely)
        self._end = ray.remote(end_remotely)
        self._ask = ray.remote(ask_remotely)
        self.by_node: Counter[str] = Counter()  # room that is taken: also by attempts that were given up without an end
        self._ghosts: Counter[str] = Counter()  # of these, by machine
        self._asked: list[Any] = []  # tasks that end workers, which nobody waits for

    def __len__(self) -> int:
        return len(self._by_stream)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._by_stream.values()))

    @property
    def with_gpu(self) -> Counter[str]:
        """The attempts that hold a GPU, by machine."""
        return Counter(flight.spot.node for flight in self if flight.spot.options.get("num_gpus"))

    def launch(self, tasks: Sequence[Task[Any]], spot: Spot) -> Flight:
        """Submit attempts on a machine. Ray repeats nothing by itself: who launches again knows where, and why."""
        name = f"{tasks[0].unit.id}.{uuid.uuid4().hex[:8]}"
        remote = self._remote.options(name=name, num_returns="streaming", max_retries=0, **spot.options)
        every_s = max(PROGRESS_S, len(self) / MESSAGES_A_SECOND)
        sent = remote.remote([spot.task(task) for task in tasks], spot.settings, every_s)
        flight = Flight(tasks, spot, name, sent)
        self._by_stream[flight.stream] = flight
        self.by_node[spot.node] += 1
        return flight

    def messages(self, timeout_s: float) -> Iterator[tuple[Flight, Message | Exception | None]]:
        """Wait for messages and yield them; of a flight that has ended its error, or None if it came to its end."""
        if not self._by_stream:
            time.sleep(min(timeout_s, 0.1))
            return
        by_signal = {flight.signal: flight for flight in self._by_stream.values()}
        ready, _ = self._ray.wait(list(by_signal), num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready and len(by_signal) > 1:
            time.sleep(PAUSE_S * len(by_signal))
            ready, _ = self._ray.wait(list(by_signal), num_returns=len(by_signal), timeout=0, fetch_local=False)
        for signal in ready:
            flight = by_signal[signal]
            if flight.stream not in self._by_stream:
                continue  # dropped by what came before
            try:
                if flight.cancelled_s is not None:
                    if signal is not flight.stream:
                        self._ray.get(signal, timeout=GET_S)
                        raise StopIteration
                    continue
                flight.late = flight.late or next(flight.stream)
                message = self._ray.get(flight.late, timeout=GET_S)
            except StopIteration:
                self.drop(flight)
                yield flight, None
            except self._ray.exceptions.GetTimeoutError:
                continue
            except self._ray.exceptions.RayError as error:
                self.drop(flight)
                yield flight, error
            else:
                flight.late = None
                yield flight, message

    def drop(self, flight: Flight) -> None:
        """Hear no more of a flight."""
        if self._by_stream.pop(flight.stream, None) is not None:
            self.by_node[flight.spot.node] -= 1
            if not self.by_node[flight.spot.node]:
                del self.by_node[flight.spot.node]

    def give_up(self, flight: Flight) -> None:
        """Hear no more of a flight that does not end, and takes room until its machine answers, or is gone."""
        self.drop(flight)
        self.by_node[flight.spot.node] += 1
        self._ghosts[flight.spot.node] += 1

    def forget(self, node: str) -> None:
        """Forget what was given up on a machine."""
        if gone := self._ghosts.pop(node, 0):
            self.by_node[node] -= gone
            if not self.by_node[node]:
                del self.by_node[node]

    def ask(self, flight: Flight) -> Any:
        """Ask the machine of a flight beside it whether it can do the work; see `answered`."""
        task = next(iter(flight.left.values()))
        return self._ask.options(num_cpus=0, max_retries=0, **_where(flight)).remote(task, current())

    def answered(self, asked: Mapping[str, Any]) -> list[str]:
        """Return the machines, of those that were asked, that can work."""
        if not asked:
            return []
        ready, _ = self._ray.wait(list(asked.values()), num_returns=len(asked), timeout=0)
        found = []
        for node, answer in asked.items():
            if answer in ready:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    if self._ray.get(answer, timeout=GET_S) == "":
                        found.append(node)
        return found

    def cancel(self, flight: Flight) -> None:
        """Ask a flight to stop; its unit then removes its part files."""
        if flight.cancelled_s is None:
            flight.cancelled_s = time.monotonic()
            # It has ended by itself, or its machine is gone.
            with contextlib.suppress(Exception):
                self._ray.cancel(flight.stream, force=False)

    def kill(self, flight: Flight) -> None:
        """End a flight's worker. Ray asks it to end; a stopped process does not hear that, so another task kills it."""
        flight.was_killed = True
        with contextlib.suppress(Exception):
            self._ray.cancel(flight.stream, force=True)
        with contextlib.suppress(Exception):
            options = self._end.options(num_cpus=0, max_retries=0, **_where(flight))
            self._asked.append(options.remote(flight.name))

    def close(self, stop_s: float = STOP_S) -> None:
        """Ask all attempts to stop, wait until they have removed their part files, then kill those that are left."""
        for flight in self:
            self.cancel(flight)
        deadline = time.monotonic() + stop_s
        while any(not f.is_stuck for f in self) and time.monotonic() < deadline:
            for _ in self.messages(min(0.2, stop_s)):
                pass
        if left := list(self):
            for flight in left:
                self.kill(flight)
            with contextlib.suppress(Exception):
                self._ray.wait(self._asked, num_returns=len(self._asked), timeout=stop_s)
        self._by_stream.clear()


def _where(flight: Flight) -> dict[str, Any]:
    """The option of a Ray task that runs it on the machine of a flight."""
    return {"scheduling_strategy": flight.spot.options["scheduling_strategy"]}


def said_by_ray(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
