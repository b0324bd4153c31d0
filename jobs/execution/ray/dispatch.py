"""Which attempt is launched, where and when: first ones, those after a death, and second ones beside the first.

The first outcome of a unit counts. Other attempts at it are cancelled then; they remove their part files, which have
names of their own, or the journal does so at its end. What an attempt costs here does not grow with the job.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.cli.verb import note
from jobs.execution.cluster import ClusterLost, OnBytes, Task, UnitFailed
from jobs.execution.live import Live
from jobs.execution.ray.deaths import Cause, Effort, cause_of, gone
from jobs.execution.ray.doubts import Doubts
from jobs.execution.ray.flights import STOP_S, WORKERS, Flight, Flights
from jobs.execution.ray.machines import memory_bytes
from jobs.execution.ray.pace import Pace
from jobs.execution.ray.placement import Placement, Spot
from jobs.execution.ray.waiting import Waiting
from jobs.execution.ray.watch import Watch
from loaders.storage.traffic import traffic

WAIT_S = 0.5  # seconds to wait for messages, at most
LOOK_S = 1.0  # seconds between two looks at all flights
# Seconds after which a unit that waits for another attempt takes a machine that it would rather not.
RESCUE_S = 10.0
QUEUED_S = 5.0  # seconds that a flight waits for CPUs before it moves to another machine
LATE_S = 30.0  # seconds that Ray may take to call a machine dead until that is said; it can be 24
ALONE_S = 60.0  # seconds without any machine after which the job ends


@dataclass(slots=True)
class Again:
    """A unit that waits for another attempt, since when."""

    effort: Effort
    since_s: float


class Dispatch:
    """Runs tasks by launching attempts at them, until each has an outcome."""

    def __init__(
        self, flights: Flights, placement: Placement, watch: Watch, live: Live, *, threads: int, at_once: int,
        retries: int,
    ) -> None:  # fmt: skip
        """`at_once` attempts fly at most; `retries` deaths of a worker are allowed for each unit."""
        self._flights = flights
        self._placement = placement
        self._watch = watch
        self._live = live
        self._pace = Pace(threads)
        self._at_once = at_once
        self._retries = retries
        self._threads = threads
        self._served_s = time.monotonic()  # when there was last a machine
        self._on_bytes: OnBytes = lambda size: None
        self._waiting = Waiting()
        self._efforts: dict[str, Effort] = {}  # of units that fly, or wait for another attempt
        self._again: dict[str, Again] = {}
        self._silent: set[str] = set()  # machines on which something is stuck, until they are heard of again
        self._pings: dict[str, Any] = {}  # questions to those machines whether they can work by now
        self._looked_s = 0.0
        self._room = 1  # Ray tasks at once, about
        self._nodes: Sequence[Any] = ()
        self._said: set[tuple[str, str]] = set()
        self._doubts = Doubts(placement)

    def run(self, tasks: Sequence[Task[Any]], on_bytes: OnBytes) -> Generator[Any]:
        """Yield outcomes.

        Raises:
            ClusterLost: its head does not answer, or no machine is left.
        """
        self._on_bytes = on_bytes
        self._waiting = Waiting(tasks)
        while self._waiting or self._efforts:
            self._watch.check()
            self._launch()
            for flight, message in self._flights.messages(WAIT_S):
                yield from self._take(flight, message)
            if time.monotonic() - self._looked_s >= LOOK_S:
                yield from self._look()
                self._looked_s = time.monotonic()

    # --- launching

    def _launch(self) -> None:
        """Launch as many attempts as there is room for: first those that are repeated."""
        refused: set[tuple[frozenset[str], int, int]] = set()
        for unit, again in list(self._again.items()):
            if len(self._flights) >= self._at_once:
                return
            effort = again.effort
            for without in self._unwanted(again):
                # Places are asked for once for all units that ask for the same.
                asked = frozenset(without), effort.memory_times, effort.task.gpus
                spot = None if asked in refused else self._place(effort.task, without, effort.memory_times)
                if spot is not None:
                    del self._again[unit]
                    effort.repeats += 1
                    self._start([effort.task], spot)
                    break
                refused.add(asked)
        while self._waiting and len(self._flights) < self._at_once:
            # If nothing flies, a machine that was silent is tried all the same.
            without = self._avoided if len(self._flights) else {*self._watch.dead}
            for tasks in self._waiting.next(self._room):
                if (spot := self._place(max(tasks, key=memory_bytes), without)) is not None:
                    self._waiting.take(tasks)
                    self._start(tasks, spot)
                    break
            else:
                return

    @property
    def _avoided(self) -> set[str]:
        return {*self._watch.dead, *self._watch.leaving, *self._silent}

    def _unwanted(self, again: Again) -> Iterator[set[str]]:
        """Yield the machines on which a unit should not be tried again; then, if there is no other, fewer."""
        here = {flight.spot.node for flight in again.effort.flights}
        yield self._avoided | here | again.effort.failed_on
        waited = time.monotonic() - again.since_s
        if waited > RESCUE_S or len(self._flights) <= len(again.effort.flights):
            yield self._avoided
        if waited > RESCUE_S and not again.effort.flights:
            yield {*self._watch.dead}

    def _place(self, task: Task[Any], without: set[str], memory_times: int = 1) -> Spot | None:
        flying, with_gpu = self._flights.by_node, self._flights.with_gpu if task.gpus else None
        spot = self._placement.place(task, flying, without=without, memory_times=memory_times, with_gpu=with_gpu)
        if spot is None and memory_times > 1 and not flying:
            # No machine has so much; then the most that one may have.
            return self._place(task, without, memory_times // 2)
        return spot

    def _start(self, tasks: Sequence[Task[Any]], spot: Spot) -> None:
        flight = self._flights.launch(tasks, spot)
        for task in tasks:
            self._efforts.setdefault(task.unit.id, Effort(task)).flights.append(flight)
        self._live.launched(tasks[0].unit.id, spot.name)

    # --- messages

    def _take(self, flight: Flight, message: Any) -> Iterator[Any]:
        if message is None or isinstance(message, Exception):
            cause = cause_of(flight, message)
            if cause.kind not in ("gone", "away"):
                self._silent.discard(flight.spot.node)
            yield from self._ended(flight, cause)
            return
        now = time.monotonic()
        self._heard(flight, now)
        outcomes: list[Any] = []
        for kind, value in message:
            if kind == "began":
                flight.has_begun = True
            elif kind == "unit":
                if flight.unit is not None:
                    self._live.launched(value, flight.spot.name)
                flight.begin(value)
            elif kind == "bytes":
                self._moved(flight, value, now)
            elif kind == "outcome":
                outcomes += self._outcome(flight, value)
            elif kind == "moved":
                traffic(WORKERS).moved(**value)
            elif kind == "compiling":
                flight.progress.is_compiling = True
            elif kind == "short":
                flight.is_short = value
        # Before its outcome is handed out: who closes this generator then cancels all flights, and one that is just
        # ending may not be, for Ray's C++ then ends this process (its issue 54798).
        if not flight.left:
            self._flights.drop(flight)
        yield from outcomes

    def _heard(self, flight: Flight, now: float) -> None:
        """Note a sign of progress: the flight is not stuck, and its machine not silent."""
        flight.progress.moved_s = now
        self._silent.discard(flight.spot.node)
        if flight.is_stuck:
            flight.is_stuck = False
            for unit in flight.left:
                self._again.pop(unit, None)

    def _moved(self, flight: Flight, size: int, now: float) -> None:
        progress = flight.progress
        is_first = progress.first_s is None
        progress.moved(size, now)
        if is_first and progress.first_s is not None:
            self._pace.first(now - progress.since_s)
        if flight.unit is not None:
            self._live.moved(flight.unit, flight.spot.name, size)
            self._recount(flight.unit)

    def _recount(self, unit: str) -> None:
        """Count of a unit what its attempt has done that is ahead of the others."""
        if (effort := self._efforts.get(unit)) is None:
            return
        most = max((f.progress.done_bytes for f in effort.flights if f.unit == unit), default=0)
        if most != effort.counted:
            self._on_bytes(most - effort.counted)
            effort.counted = most

    def _outcome(self, flight: Flight, outcome: Any) -> Iterator[Any]:
        flight.left.pop(outcome.unit, None)
        if (effort := self._efforts.get(outcome.unit)) is None:
            return  # another attempt was first
        is_asked = flight in effort.flights
        if is_asked:
            effort.flights.remove(flight)
        if isinstance(outcome, UnitFailed):
            if flight.cancelled_s is not None or not is_asked:
                return  # it was stopped
            effort.failure = outcome.reason
            if effort.flights or self._doubts.raised(effort, flight.spot, outcome):
                self._left(flight, outcome.unit)
                return  # it may succeed elsewhere
            self._live.ended(outcome.unit, flight.spot.name, "failed", outcome.reason)
        else:
            self._pace.ended(effort.task.work_bytes, time.monotonic() - flight.progress.since_s)
            self._live.ended(outcome.unit, flight.spot.name, "done")
            outcome = replace(outcome, attempts=outcome.attempts + effort.repeats)
        self._settle(effort)
        yield outcome

    def _settle(self, effort: Effort) -> None:
        """Forget a unit that has its outcome, and cancel other attempts at it."""
        unit = effort.task.unit.id
        self._efforts.pop(unit, None)
        self._again.pop(unit, None)
        for other in effort.flights:
            other.left.pop(unit, None)
            self._left(other, unit)
            if not other.left:
                self._flights.cancel(other)

    def _left(self, flight: Flight, unit: str) -> None:
        """Tell of an attempt that ended without being the unit's outcome."""
        if unit == (flight.unit or flight.first):
            self._live.moved(unit, flight.spot.name, -flight.progress.done_bytes)
            self._live.ended(unit, flight.spot.name, "again")
            flight.progress.done_bytes = 0

    def _resolve(self) -> Iterator[Any]:
        """Try units elsewhere that failed on machines that cannot work; yield those that failed on others."""
        for effort, spot, outcome, is_out in self._doubts.resolved():
            if outcome.unit not in self._efforts:
                continue
            if is_out:
                effort.failed_on.add(spot.node)
                self._queue(effort)
            else:
                self._live.ended(outcome.unit, spot.name, "failed", outcome.reason)
                self._settle(effort)
                yield outcome

    # --- deaths

    def _ended(self, flight: Flight, cause: Cause) -> Iterator[Any]:
        """Try the units of a flight again that has ended without their outcomes; yields those that are given up."""
        for unit in list(flight.left):
            effort = self._efforts.get(unit)
            if effort is None or flight not in effort.flights:
                continue
            effort.flights.remove(flight)
            self._left(flight, unit)
            if unit == flight.unit or (flight.unit is None and cause.kind in ("fault", "memory", "crash")):
                effort.died(cause, flight)
                self._say(flight, cause)
            self._recount(unit)
            if effort.flights:
                continue
            if effort.is_hopeless(self._retries):
                failed = UnitFailed(unit, effort.failure or effort.words)
                self._live.ended(unit, flight.spot.name, "failed", failed.reason)
                self._settle(effort)
                yield failed
            else:
                self._queue(effort)

    def _queue(self, effort: Effort) -> None:
        self._again.setdefault(effort.task.unit.id, Again(effort, time.monotonic()))

    def _say(self, flight: Flight, cause: Cause) -> None:
        """Tell the user about a death: of one machine, once for each kind."""
        if cause.kind in ("memory", "crash", "gone") and (flight.spot.node, cause.kind) not in self._said:
            self._said.add((flight.spot.node, cause.kind))
            note(f"{flight.unit} is tried again: {cause.words} ({flight.spot.name})")

    # --- looking at all flights

    def _look(self) -> Iterator[Any]:
        """Look for machines that came, died or will leave, and for attempts that are stuck, left over or slow."""
        now = time.monotonic()
        self._refresh(now)
        for flight in self._flights:
            node = flight.spot.node
            if node in self._watch.dead:
                self._tell_late(flight, now)
                self._flights.kill(flight)
                self._flights.drop(flight)
                yield from self._ended(flight, gone(flight))
            elif flight.cancelled_s is not None:
                self._press(flight, now)
            elif node in self._watch.leaving:
                self._move(flight, f"{flight.spot.name} will leave the cluster: its units move")
            elif self._is_queued(flight, now):
                # Nothing is lost: it has not begun.
                self._flights.cancel(flight)
                yield from self._ended(flight, Cause("away", "other jobs use its machine"))
            elif self._pace.is_stuck(flight.progress, now):
                yield from self._stuck(flight, now)
        for node in self._watch.dead:
            self._flights.forget(node)
            self._pings.pop(node, None)
        yield from self._resolve()
        if not self._waiting and not self._again:
            self._overtake(now)
        elif not len(self._flights) and (why := self._placement.hopeless()) is not None:
            raise ClusterLost(f"cluster: {why}")

    def _tell_late(self, flight: Flight, now: float) -> None:
        """Say once if Ray has taken long to call a machine dead, which is set where the cluster is started."""
        silent = now - max(flight.progress.moved_s, flight.progress.since_s)
        if silent > LATE_S and ("", "late") not in self._said:
            self._said.add(("", "late"))
            name = flight.spot.name
            note(f"Ray called {name} dead {silent:.0f} s after its last word; docs/clusters.md shortens that")

    def _is_queued(self, flight: Flight, now: float) -> bool:
        """Whether a flight waits for CPUs of its machine that other jobs use, while another machine is idle."""
        if flight.has_begun or now - flight.progress.since_s < QUEUED_S:
            return False
        node, task = flight.spot.node, next(iter(flight.left.values()), None)
        flying, without = self._flights.by_node, self._avoided | {node}
        if task is None or not self._placement.is_crowded(node):
            return False
        return self._placement.place(task, flying, without=without, only_free=True) is not None

    def _refresh(self, now: float) -> None:
        """Take the latest list of machines.

        Raises:
            ClusterLost: there has been none for ALONE_S.
        """
        if self._watch.nodes is not self._nodes:
            self._nodes = self._watch.nodes
            left = len(self._waiting) + len(self._efforts)
            self._placement.refresh(self._nodes, left, self._watch.available)
            cpus = [node["Resources"].get("CPU", 0) for node in self._nodes if node["Alive"]]
            self._room = max(1, sum(int(count // self._threads) for count in cpus))
            if any(cpus):
                self._served_s = now
        if now - self._served_s > ALONE_S:
            raise ClusterLost(f"cluster: no machine has been left for {now - self._served_s:.0f} s")
        for node in self._flights.answered(self._pings):
            del self._pings[node]
            self._silent.discard(node)
            self._flights.forget(node)

    def _press(self, flight: Flight, now: float) -> None:
        """See to it that a flight ends that was cancelled."""
        waited = now - (flight.cancelled_s or now)
        if waited > STOP_S and not flight.was_killed:
            self._flights.kill(flight)
        elif waited > 2 * STOP_S:
            self._flights.give_up(flight)

    def _move(self, flight: Flight, why: str) -> None:
        """Launch the units of a flight elsewhere; it goes on, and may still be first."""
        if (flight.spot.node, "moves") not in self._said:
            self._said.add((flight.spot.node, "moves"))
            note(why)
        for unit in flight.left:
            if (effort := self._efforts.get(unit)) is not None and effort.flights == [flight]:
                self._queue(effort)

    def _stuck(self, flight: Flight, now: float) -> Iterator[Any]:
        """Have the units of a flight tried elsewhere that makes no progress, or end it if there is no elsewhere."""
        still = now - max(flight.progress.moved_s, flight.progress.since_s)
        if not flight.is_stuck:
            flight.is_stuck = True
            self._silent.add(flight.spot.node)
            if flight.spot.node not in self._pings:
                self._pings[flight.spot.node] = self._flights.ask(flight)
            self._move(flight, f"{flight.spot.name} has made no progress for {still:.0f} s: its units run elsewhere")
            if not flight.has_begun:
                # It has not begun, and nothing is lost. Its machine may be busy with other jobs.
                self._flights.cancel(flight)
                yield from self._ended(flight, Cause("away", "its machine took no work"))
        elif all(each.is_lost for each in self._flights) and still > self._pace.patience_s(flight.progress) + RESCUE_S:
            # All others are stuck, too, or there is none: its room is needed.
            self._flights.cancel(flight)
            self._flights.kill(flight)
            yield from self._ended(flight, Cause("stuck", "it made no progress"))

    def _overtake(self, now: float) -> None:
        """Launch second attempts at the slowest units, where machines have nothing else to do."""
        slow = []
        for flight in self._flights:
            unit = flight.unit
            if flight.is_lost or unit not in flight.left or self._efforts[unit].flights != [flight]:
                continue
            if (left := self._pace.left_s(flight.progress, now)) is not None:
                slow.append((left, unit, flight))
        for _, unit, flight in sorted(slow, key=lambda each: each[:2], reverse=True):
            if len(self._flights) >= self._at_once:
                return
            spot = self._place(self._efforts[unit].task, self._avoided | {flight.spot.node})
            if spot is None:
                return
            self._efforts[unit].repeats += 1
            self._start([self._efforts[unit].task], spot)
