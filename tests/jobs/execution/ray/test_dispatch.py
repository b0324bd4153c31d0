"""Whatever machines do, each unit gets one outcome: on a simulated cluster, in a simulated time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from jobs.execution.cluster import ClusterLost, UnitFailed
from jobs.execution.live import Live
from jobs.execution.ray import dispatch as dispatching
from jobs.execution.ray import flights as flying
from jobs.execution.ray.dispatch import Dispatch
from jobs.execution.ray.flights import Flights
from tests.jobs.execution.ray.fake_ray import (
    FakePlacement,
    FakeRay,
    FakeReport,
    FakeTask,
    FakeWatch,
    Machine,
    NodeDiedError,
    OutOfMemoryError,
    WorkerCrashedError,
    tasks,
)

pytestmark = pytest.mark.quick
LARGE = 64 << 20  # bytes of a unit that shares its Ray task with no other


class Ran:
    """What came of tasks on a simulated cluster."""

    def __init__(self, ray: FakeRay, given: list[FakeTask], patch: pytest.MonkeyPatch, **settings: Any) -> None:
        patch.setattr(dispatching, "time", ray)
        patch.setattr(flying, "time", ray)
        self.notes: list[str] = []
        patch.setattr(dispatching, "note", self.notes.append)
        self.placement = settings.pop("placement", None) or FakePlacement(ray)
        self.flights, self.live, self.bytes = Flights(ray), Live(), 0
        self.dispatch = Dispatch(
            self.flights, self.placement, FakeWatch(ray), self.live,  # type: ignore[arg-type]
            **{"threads": 1, "at_once": sys.maxsize, "retries": 3, **settings},
        )  # fmt: skip
        self.outcomes: list[Any] = []
        self.most_efforts = 0
        for outcome in self.dispatch.run(given, self.count):  # type: ignore[arg-type]
            self.outcomes.append(outcome)
            # Who stops here cancels what flies, of which nothing may be about to end.
            assert all(flight.left or flight.cancelled_s is not None for flight in self.flights)
            self.most_efforts = max(self.most_efforts, len(self.dispatch._efforts))
        self.took_s = ray.passed_s
        assert sorted(each.unit for each in self.outcomes) == sorted(task.unit.id for task in given)
        with self.live.flying() as left:
            assert left == []

    def count(self, size: int) -> None:
        self.bytes += size

    @property
    def done(self) -> Counter[str]:
        return Counter(each.node for each in self.outcomes if isinstance(each, FakeReport))

    @property
    def failed(self) -> list[str]:
        return [each.reason for each in self.outcomes if isinstance(each, UnitFailed)]


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda ray, given, **settings: Ran(ray, given, monkeypatch, **settings)


def large(count: int, **fields: Any) -> list[FakeTask]:
    return tasks(count, LARGE, **fields)


def machine(**fields: Any) -> Machine:
    """A machine on which a large unit takes a second."""
    return Machine(**{"rate": LARGE, **fields})


def test_undisturbed_units_run_once_and_everywhere(run: Run) -> None:
    ray = FakeRay(a=machine(slots=2), b=machine())
    ran = run(ray, large(30))
    assert ran.done.total() == ray.counts["tasks"] == 30
    assert ran.done["a"] == pytest.approx(20, abs=2)
    assert ran.bytes == 30 * LARGE
    assert ran.took_s == pytest.approx(30 / 3 * 1.1, rel=0.2)
    assert ran.notes == []
    assert ran.live.done == ran.done


@pytest.mark.parametrize("fault", ["frozen_s", "workers_freeze_s"])
def test_what_is_frozen_for_good_runs_elsewhere(fault: str, run: Run) -> None:
    ray = FakeRay(a=machine(), b=machine(**{fault: 5.3}), c=machine())
    ran = run(ray, large(100))
    assert ran.failed == []
    assert ran.bytes == 100 * LARGE
    assert ran.done["b"] < 6 if fault == "frozen_s" else ran.done["b"] > 3
    assert ran.took_s < 75
    [said] = ran.notes
    assert said.startswith("b has made no progress for 1")
    assert {each.attempts for each in ran.outcomes} == {1, 2}
    ran.flights.close()
    assert len(ran.flights) == 0


def test_a_frozen_worker_of_the_only_machine_is_killed(run: Run) -> None:
    ray = FakeRay(a=machine(workers_freeze_s=5.3))
    ran = run(ray, large(10))
    assert ran.done["a"] == 10
    assert ray.counts["killed"] == 1
    assert ran.took_s < 60
    assert ran.bytes == 10 * LARGE


def test_units_that_are_stuck_wherever_they_run_are_given_up(run: Run) -> None:
    ray = FakeRay(a=machine(hangs=True), b=machine(hangs=True))
    ran = run(ray, large(1), retries=1)
    assert "it made no progress (" in ran.failed[0]
    assert "look at those machines' disks, mounts and devices" in ran.failed[0]


def test_compiling_for_long_is_not_stuck(run: Run) -> None:
    ray = FakeRay(a=machine(compiles_s=55), b=machine(compiles_s=10))
    ran = run(ray, large(50))
    assert ran.notes == []
    assert ray.counts["killed"] == 0


def test_units_of_a_dead_machine_run_elsewhere_at_once(run: Run) -> None:
    ray = FakeRay(a=machine(), b=machine(dies_s=5.3))
    ran = run(ray, large(20))
    assert ran.failed == []
    assert ran.took_s < 20
    assert any("its machine went away (b)" in said for said in ran.notes)
    assert not any("docs/clusters.md" in said for said in ran.notes)  # Ray knew at once
    assert all(when < 6.5 for node, _, _, when in ray.launched if node == "b")


def test_it_is_said_where_a_worker_never_began(run: Run) -> None:
    """Those that are launched on b at once never begin, since it is frozen."""
    ran = run(FakeRay(a=machine(), b=machine(frozen_s=0.0)), large(5))
    assert ran.failed == []
    assert [said.partition(" for ")[0] for said in ran.notes] == ["b has made no progress"]


def test_it_is_said_once_if_ray_takes_long_to_call_a_machine_dead(run: Run) -> None:
    late = {"frozen_s": 2.3, "dies_s": 45.3}
    ran = run(FakeRay(a=machine(), b=machine(**late), c=machine(**late)), large(70))
    assert ran.failed == []
    [said] = [said for said in ran.notes if "docs/clusters.md" in said]
    assert "Ray called b dead 44 s after its last word" in said


def test_units_of_a_machine_that_will_leave_move_at_once_and_the_first_outcome_counts(run: Run) -> None:
    ray = FakeRay(a=machine(slots=2), b=machine(rate=LARGE / 100, leaves_s=2.5))
    ran = run(ray, large(8))
    assert ran.done == {"a": 8}
    assert ran.notes == ["b will leave the cluster: its units move"]
    assert ran.took_s < 10


def test_a_slow_machine_does_not_have_the_last_word(run: Run) -> None:
    ray = FakeRay(a=machine(), b=machine(rate=LARGE / 50))
    ran = run(ray, large(20))
    assert ran.done["a"] == 20
    assert ran.took_s < 30
    assert ran.bytes == 20 * LARGE
    assert ray.counts["cancelled"] == 1


def test_units_of_unlike_sizes_are_not_run_twice(run: Run) -> None:
    ray = FakeRay(a=machine(), b=machine())
    given = [FakeTask(task.unit, LARGE * (1 + number % 7)) for number, task in enumerate(large(30))]
    ran = run(ray, given)
    assert ray.counts["tasks"] == 30
    assert ran.done.total() == 30


def test_memory_is_doubled_twice_and_then_the_unit_is_given_up_with_its_tensor(run: Run) -> None:
    ray = FakeRay(a=machine(), b=machine())
    [task] = large(1, dies_by=OutOfMemoryError)
    ran = run(ray, [task])
    assert [memory // task.memory_bytes for _, _, memory, _ in ray.launched] == [1, 2, 4]
    assert ran.failed == [
        "its worker was killed for memory (a), then its worker was killed for memory (b), then its worker was killed"
        " for memory (a); it asked for 1.26 GB, and its largest tensor is layers.0.weight with 67.1 MB; give fewer"
        " cluster.threads, a smaller unit_mb, or machines with more memory"
    ]
    assert ran.notes[0] == "unit-000000 is tried again: its worker was killed for memory (a)"


def test_a_worker_that_dies_on_a_machine_short_of_memory_counts_as_killed_for_it(run: Run) -> None:
    ray = FakeRay(a=machine(is_short=True))
    ran = run(ray, large(1, dies_by=WorkerCrashedError))
    assert [memory >> 20 for _, _, memory, _ in ray.launched] == [1, 2, 4]
    assert "its worker died while the machine was short of memory (a)" in ran.failed[0]


def test_no_machine_has_twice_the_memory(run: Run) -> None:
    ray = FakeRay(a=machine())
    placement = FakePlacement(ray, most_memory=3 << 20)
    ran = run(ray, large(1, dies_by=OutOfMemoryError), placement=placement)
    assert [memory >> 20 for _, _, memory, _ in ray.launched] == [1, 2, 2]
    assert len(ran.failed) == 1


@pytest.mark.parametrize("retries", [0, 3])
def test_deaths_of_a_worker_are_bounded(retries: int, run: Run) -> None:
    ray = FakeRay(a=machine(), b=machine())
    ran = run(ray, [*large(1, dies_by=WorkerCrashedError), *large(6)[1:]], retries=retries)
    assert ran.done.total() == 5
    [said] = ran.failed
    assert said.count("its worker died (") == retries + 1
    assert "cluster.retries allows more deaths" in said


def test_a_unit_that_takes_three_machines_down_is_given_up(run: Run) -> None:
    ray = FakeRay(**{name: machine() for name in "abcde"})
    ran = run(ray, large(1, dies_by=NodeDiedError))
    assert ran.failed[0].count("its machine went away") == 3
    assert len({node for node, *_ in ray.launched}) == 3


def test_a_unit_fails_by_its_own_words(run: Run) -> None:
    ran = run(FakeRay(a=machine(), b=machine()), large(2, fails="a.safetensors: it is cut short"))
    assert ran.failed == ["a.safetensors: it is cut short"] * 2
    assert ran.live.failed == {each.unit: each.reason for each in ran.outcomes}


def test_a_unit_that_fails_by_its_machine_runs_elsewhere(run: Run) -> None:
    ray = FakeRay(a=machine(), b=machine())
    placement = FakePlacement(ray, out_if_asked=("a",))
    ran = run(ray, large(1, fails="the output's folder is gone"), placement=placement)
    assert [node for node, *_ in ray.launched] == ["a", "b"]
    assert placement.doubted == ["a", "b"]
    assert ran.failed == ["the output's folder is gone"]


def test_small_units_share_a_task_and_a_death_blames_one_of_them(run: Run) -> None:
    ray = FakeRay(a=Machine(slots=2, rate=1e6), b=Machine(slots=2, rate=1e6))
    bad = tasks(1, dies_by=WorkerCrashedError)
    ran = run(ray, [*bad, *tasks(400)[1:]])
    assert ran.done.total() == 399
    assert len(ran.failed) == 1
    assert ray.counts["tasks"] < 80
    assert [len(units) for _, units, _, _ in ray.launched[-4:]] == [1, 1, 1, 1]


def test_without_machines_the_job_ends(run: Run) -> None:
    ray = FakeRay(a=machine(dies_s=3.3))
    with pytest.raises(ClusterLost, match="no machine has been left for 6"):
        run(ray, large(10))


def test_the_cost_of_a_unit_does_not_grow_with_the_job(run: Run) -> None:
    """Counted are calls of Ray, and streams that it looks at, over 100,000 units on 64 slots."""

    def cost(count: int) -> tuple[float, float, float, int]:
        ray = FakeRay(**{f"m{number}": Machine(slots=4, rate=400) for number in range(16)})
        ran = run(ray, tasks(count, size=20))
        assert ran.done.total() == count
        calls = [ray.counts[each] / count for each in ("tasks", "messages", "looked at")]
        return calls[0], calls[1], calls[2], ran.most_efforts

    few, many = cost(5_000), cost(100_000)
    assert many[0] < 0.08
    assert many[1] < 2.5
    assert many[2] < 150
    assert all(after < before * 1.3 for before, after in zip(few, many, strict=True))
    assert many[3] <= 64 * 16 + 1
