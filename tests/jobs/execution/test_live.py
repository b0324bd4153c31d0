"""What flies, by machine: counts, rates, and the words of the display."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobs.execution import live
from jobs.execution.cluster import LocalCluster, UnitFailed
from jobs.execution.live import Live
from jobs.execution.live_text import MOST_LINES, WatchedLive
from jobs.spec.cluster import ClusterSpec
from loaders.errors import BadCheckpoint, TransientIOError

pytestmark = pytest.mark.quick


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(live.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_rates_are_of_the_last_seconds_and_on_average(clock: Clock) -> None:
    mine = Live()
    mine.begin("quantizing", 4, 3_000_000_000)
    for unit, node in (("unit-1", "h1"), ("unit-2", "h2")):
        mine.launched(unit, node)
    clock.now += 20
    mine.moved("unit-1", "h1", 1_000_000_000)
    mine.ended("unit-1", "h1", "done")
    clock.now += 30  # h1 has nothing to do any longer
    mine.moved("unit-2", "h2", 200_000_000)
    seen = mine.seen()
    rates = {each.name: each.bytes_per_s for each in seen.machines}
    assert rates == {"h1": 0.0, "h2": 20_000_000.0}
    assert (seen.bytes_per_s, seen.mean_bytes_per_s) == (20_000_000.0, 24_000_000.0)
    assert seen.seconds_left == pytest.approx(1_800_000_000 / 24_000_000)
    [flying] = seen.flying
    assert (flying.unit, flying.machine, flying.seconds, flying.bytes, flying.still_s) == (
        "unit-2", "h2", 50.0, 200_000_000, 0.0,
    )  # fmt: skip
    mine.moved("unit-2", "h2", -200_000_000)
    mine.ended("unit-2", "h2", "again")
    seen = mine.seen()
    assert (seen.done, seen.done_bytes, seen.retries, seen.flying) == (1, 1_000_000_000, 1, ())
    mine.begin("verifying", 1, 1)
    assert mine.seen().machines == ()


def test_any_thread_may_tell_it() -> None:
    mine = Live()
    mine.begin("quantizing", 8, 8000)

    def work(number: int) -> None:
        unit, node = f"unit-{number}", f"h{number % 2}"
        mine.launched(unit, node)
        for _ in range(1000):
            mine.moved(unit, node, 1)
            if number == 0:
                mine.seen()
        mine.ended(unit, node, "done")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    seen = mine.seen()
    assert (seen.done, seen.done_bytes, seen.flying) == (8, 8000, ())
    assert [(each.name, each.done, each.bytes) for each in seen.machines] == [("h0", 4, 4000), ("h1", 4, 4000)]


def test_the_display_says_where_units_start_then_what_machines_do_and_which_unit_is_slow(clock: Clock) -> None:
    mine = Live()
    shown = WatchedLive(mine, "the Ray cluster at a: 2 machines")
    mine.begin("quantizing", 40, 4_000_000_000)
    for number in range(2):
        mine.launched(f"unit-{number}", f"h{number}")
    clock.now += 4
    assert shown.starting() == (
        "units start on the Ray cluster at a: 2 machines (4 s, nothing done yet; 2 units sent to h0, h1)"
    )
    mine.moved("unit-0", "h0", 50_000_000)
    assert shown.starting() == ""
    assert shown.summary() == "12.50 MB/s now on 2 machines (h0, h1)"
    clock.now += 60
    mine.ended("unit-0", "h0", "done")
    mine.repeated("h0")
    assert shown.machines() == [
        "h0: 0 units in flight, 1 done, 0 B/s, 1 retry",
        "h1: 1 unit in flight, 0 done, 0 B/s",
        "1 retry",
        "slowest: unit-1 on h1, 64 s, no bytes for 64 s",
    ]
    for number in range(20):
        mine.launched(f"more-{number}", f"n{number:02}")
    lines = shown.machines()
    assert len([line for line in lines if "in flight" in line]) == MOST_LINES + 1
    assert f"{22 - MOST_LINES} more: " in " ".join(lines)


class Work:
    """A task that fails in passing as often as is said, and then for good if that is asked for."""

    def __init__(self, passing: int = 0, *, fails: bool = False) -> None:
        self.unit: Any = type("Unit", (), {"id": f"unit-{passing}-{fails}"})
        self.memory_bytes = self.gpus = 0
        self._passing, self._fails = passing, fails

    def reach(self) -> None: ...

    def run(self, on_bytes: Any, stop: Any) -> Any:
        on_bytes(10)
        if self._passing:
            self._passing -= 1
            raise TransientIOError("it passes")
        if self._fails:
            raise BadCheckpoint("it is cut short")
        from jobs.execution.unit import UnitReport
        from loaders.stats import LoadStats

        return UnitReport(self.unit.id, {}, {}, LoadStats())


def test_this_process_tells_what_its_units_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.execution.cluster.FIRST_PAUSE_S", 0.001)
    cluster, counted = LocalCluster(ClusterSpec(kind="local", threads=1)), list[int]()
    tasks: Any = [Work(), Work(2), Work(fails=True)]
    outcomes = list(cluster.run(tasks, counted.append))
    seen = cluster.live.seen()
    assert len([each for each in outcomes if isinstance(each, UnitFailed)]) == len(seen.failed) == 1
    [machine] = seen.machines
    assert (machine.done, machine.retries, machine.flying) == (2, 2, 0)
    assert machine.bytes == sum(counted) == 30
