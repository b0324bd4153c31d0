"""Where attempts go, which machines take part, and how many units each has at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.execution.ray import fitting, nodes
from jobs.execution.ray.asking import Answer, Facts, Question, look_remotely, source_fault
from jobs.execution.ray.fitting import Scaling, await_machines, check_fits
from jobs.execution.ray.placement import Placement
from jobs.execution.ray.waiting import Waiting
from jobs.output.journal import Journal
from jobs.spec.cluster import ClusterSpec
from loaders.errors import BadSpec, StorageError
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.folder_destination import FolderDestination
from loaders.storage.settings import current, use
from tests.jobs.execution.ray.fake_machines import FakeError, FakeRay, FakeTask, node

pytestmark = pytest.mark.quick
CPU, GPU = FakeTask(), FakeTask(1, gpus=1)


@pytest.fixture(autouse=True)
def _short_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own class takes only ids of its length."""
    strategy = "ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy"
    monkeypatch.setattr(strategy, lambda node_id, *, soft: SimpleNamespace(node_id=node_id, soft=soft))


def placed(ray: FakeRay, *tasks: FakeTask, joined: bool = False, threads: int = 4, **settings: Any) -> Placement:
    spec = ClusterSpec(kind="ray", address="1.2.3.4:6379", **settings)
    return Placement(ray, spec, threads, tasks or (CPU,), is_joined=joined)


def filled(placement: Placement, *tasks: FakeTask, **how: Any) -> Counter[str]:
    """Place tasks, the last one again and again, until there is no room; returns how many each machine has."""
    flying, with_gpu = Counter[str](), Counter[str]()
    todo = list(tasks)
    while True:
        task = todo.pop(0) if len(todo) > 1 else todo[0]
        spot = placement.place(task, flying, with_gpu=with_gpu, **how)
        if spot is None and len(todo) == 1:
            return flying
        if spot is not None:
            flying[spot.node] += 1
            with_gpu[spot.node] += task.gpus


# --- room


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"a": 2, "b": 1, "c": 1}),
        ({"units_per_node": 1}, {"a": 1, "b": 1, "c": 1}),
        ({"units_at_once": 3}, {"a": 1, "b": 1, "c": 1}),
        ({"labels": {"zone": "x"}}, {"b": 1}),
        ({"resources": {"nvme": 0.5}}, {"c": 1}),
    ],
)
def test_machines_have_as_many_units_as_they_have_room_for(settings: Any, expected: dict[str, int]) -> None:
    """c has too few CPUs for four threads, and works with two; none would have done where all must be alike."""
    ray = FakeRay(node("a", 8), node("b", 4, labels={"zone": "x"}), node("c", 2, nvme=1), node("head", 0))
    assert filled(placed(ray, **settings), CPU) == expected


def test_each_machine_gets_work_before_one_gets_more() -> None:
    placement = placed(FakeRay(node("large", 32), node("small", 4), node("other", 4)))
    flying = Counter[str]()
    for _ in range(3):
        spot = placement.place(CPU, flying)
        assert spot is not None
        flying[spot.node] += 1
    assert set(flying) == {"large", "small", "other"}


def test_a_unit_has_the_threads_and_the_memory_of_its_machine() -> None:
    placement = placed(FakeRay(node("a", 2, 4)))
    spot = placement.place(CPU, {})
    assert spot is not None
    assert (spot.options["num_cpus"], spot.task(CPU).threads, spot.threads) == (2, 2, 2)
    assert spot.options["scheduling_strategy"].node_id == "a"
    doubled = placement.place(CPU, {}, memory_times=2)
    assert doubled is not None
    assert doubled.options["memory"] == 2 * spot.options["memory"]
    assert placement.place(CPU, {}, memory_times=4) is None  # it has 4 GB
    assert placement.place(CPU, {}, without={"a"}) is None


def test_memory_bounds_the_units_of_a_machine() -> None:
    assert filled(placed(FakeRay(node("a", 64, 3))), CPU) == {"a": 2}


def test_units_without_a_gpu_leave_room_for_those_with_one() -> None:
    ray = FakeRay(node("gpu", 12, GPU=2), node("cpu", 8))
    placement = placed(ray, GPU, CPU)
    assert filled(placement, CPU) == {"cpu": 2, "gpu": 1}
    assert filled(placement, GPU) == {"gpu": 2}
    assert filled(placement, CPU, CPU, CPU, GPU) == {"cpu": 2, "gpu": 3}


def test_without_other_machines_units_take_those_with_gpus() -> None:
    assert filled(placed(FakeRay(node("gpu", 8, GPU=2)), GPU, CPU), CPU) == {"gpu": 2}


def test_machines_that_other_jobs_use_come_last() -> None:
    ray = FakeRay(node("a", 8), node("b", 4))
    placement = placed(ray, joined=True)
    available = {"a": {"CPU": 0.0}, "b": {"CPU": 4.0}}
    placement.refresh(ray.nodes(), available=available)
    assert placement.place(CPU, {}).node == "a"  # type: ignore[union-attr]  # one look may be old
    placement.refresh(ray.nodes(), available=available)
    assert placement.place(CPU, {}).node == "b"  # type: ignore[union-attr]
    assert placement.place(CPU, {}, without={"b"}, only_free=True) is None
    assert placement.place(CPU, {"b": 1}).node == "a"  # type: ignore[union-attr]  # it waits there in turn
    placement.place(CPU, {"a": 1})
    assert placement.is_crowded("a")
    assert not placement.is_crowded("b")


def test_what_is_read_is_shared_out_over_the_units() -> None:
    ray = FakeRay(node("a", 8), node("b", 8))
    spot = placed(ray, *(FakeTask(n) for n in range(9)), read_limit_gbps=2.0).place(CPU, {})
    assert spot is not None
    assert spot.settings.read_limit == 0.5e9
    few = placed(ray, CPU, read_limit_gbps=2.0).place(CPU, {})
    assert few is not None
    assert few.settings.read_limit == 2e9


def test_what_takes_part_is_said_in_a_line_for_what_is_alike() -> None:
    ray = FakeRay(node("a", 8), node("b", 8), node("c", 2), node("d", 8, GPU=1))
    assert placed(ray).lines == [
        "a, b and d: 2 units at once each, of 4 threads",
        "c: 1 unit at once, of 2 threads",
    ]
    assert placed(ray, GPU, CPU).lines == [
        "a and b: 2 units at once each, of 4 threads",
        "d: 1 unit at once, of 4 threads and a GPU",
        "c: 1 unit at once, of 2 threads",
    ]


@pytest.mark.parametrize(
    ("threads", "gpus", "offers", "said"),
    [
        (2, 0, (2, 8), None),
        (1000, 0, (2, 8), r"a unit needs 1000 CPUs and 1.31 GB of memory; .* offers 2 and 8.00 GB"),
        (2, 0, (2, 1), r"a unit needs 2 CPUs and 1.31 GB of memory; .* offers 2 and 1.00 GB"),
        (2, 1, (2, 8), "a unit on backend=cuda needs a GPU, and no machine offers one"),
    ],
)
def test_what_no_machine_offers_is_refused(threads: int, gpus: int, offers: Any, said: str | None) -> None:
    ray, spec = FakeRay(node("a", *offers)), ClusterSpec(kind="ray")
    task = FakeTask(gpus=gpus, threads=threads)
    if said is None:
        check_fits(ray, spec, threads, [task], Scaling(spec))
        return
    with pytest.raises(BadSpec, match=said):
        check_fits(ray, spec, threads, [task], Scaling(spec))


# --- what machines are asked


def running(ray: FakeRay, machine: str, **facts: Any) -> None:
    """Have a machine answer that it runs something else."""

    def answer(question: Question, settings: Any) -> Answer:
        found = look_remotely(question, settings)
        return replace(found, facts=replace(found.facts, **facts))

    ray.answers[machine] = answer


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = Journal(Address.of(tmp_path / "out"), "0" * 12)
    found.destination.prepare(overwrite=False)
    before = current()
    yield found
    use(before)
    assert not [each.name for each in found.destination.root.iterdir() if "asked" in each.name]  # type: ignore[attr-defined]


def test_machines_of_other_versions_are_left_out_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay(*(node(name) for name in ("same", "old", "older", "patch", "numpy", "code", "late")))
    here = Facts()
    running(ray, "old", python="3.9.1")
    running(ray, "older", python="3.9.1")
    running(ray, "patch", python=f"{here.python}.9", numba=f"{here.numba}.9")
    running(ray, "numpy", numpy="0.1")
    running(ray, "code", code="abc")
    running(ray, "late", clock_s=here.clock_s - 3600)
    placement = placed(ray, joined=True)
    assert filled(placement, CPU) == {"same": 1, "patch": 1, "numpy": 1, "code": 1, "late": 1}
    said = capsys.readouterr().err
    assert f"old and older are left out: it has Python 3.9.1, and this machine {here.python}" in said
    assert "numpy: it has numpy 0.1, and this machine" in said
    assert "late: its clock is 3600 s behind" in said
    placed(ray, joined=True, ship_code=False)
    assert "code is left out: its weightmill is another (code abc" in capsys.readouterr().err


def test_a_job_without_a_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay(node("a"), node("b"))
    running(ray, "a", numba="0.1.0")
    ray.answers["b"] = lambda question, settings: Answer(facts=Facts(), fault="x is not in the source there")
    with pytest.raises(StorageError, match="no machine reads the source and writes the output"):
        placed(ray, joined=True)
    said = capsys.readouterr().err
    assert "a is left out: it has numba 0.1.0" in said
    assert "b is left out: x is not in the source there" in said


def test_of_unlike_architectures_the_larger_group_works_where_bytes_may_differ() -> None:
    ray = FakeRay(node("a"), node("b"), node("c", 16))
    for name in ("a", "b"):
        running(ray, name, architecture="x86_64")
    running(ray, "c", architecture="aarch64")
    assert set(filled(placed(ray, joined=True), CPU)) == {"a", "b", "c"}
    assert set(filled(placed(ray, FakeTask(by_architecture=True), joined=True), CPU)) == {"c"}


def test_the_next_phase_of_a_job_says_nothing_again(capsys: pytest.CaptureFixture[str]) -> None:
    ray, said = FakeRay(node("a"), node("b")), set[str]()
    running(ray, "b", numba="0.1.0")
    spec = ClusterSpec(kind="ray", address="1.2.3.4:6379")
    for _ in range(2):
        Placement(ray, spec, 4, (CPU,), is_joined=True, said=said)
    assert capsys.readouterr().err.count("b is left out: it has numba 0.1.0") == 1


def test_a_folder_that_cannot_be_written_to_is_named_alike_in_each_phase(
    journal: Journal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FolderDestination, name: str, data: bytes) -> None:
        raise StorageError(f"writing {self.root / name}: Read-only file system")

    def read_only(question: Question, settings: Any) -> Answer:
        with monkeypatch.context() as patch:
            patch.setattr(FolderDestination, "put", refuse)
            return look_remotely(question, settings)

    ray = FakeRay(node("a"), node("b"))
    ray.answers["b"] = read_only
    placed(ray, FakeTask(journals=(journal,)), joined=True).close()
    assert "/.out.000000000000.weightmill: Read-only file system" in capsys.readouterr().err


def test_the_output_must_be_the_same_folder(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.execution.ray.asking.AGAIN_S", 0.0)
    other = Journal(Address.of(tmp_path / "elsewhere/out"), "0" * 12)
    other.destination.prepare(overwrite=False)
    gone = Journal(Address.of(tmp_path / "nowhere/out"), "0" * 12)

    def seeing(found: Journal) -> Callable[..., Any]:
        return lambda question, settings: look_remotely(
            replace(question, outputs=((found.output, found.key),)), settings
        )

    def unseen(question: Question, settings: Any) -> Answer:
        return replace(look_remotely(question, settings), wrote="another")

    ray = FakeRay(*(node(name) for name in ("same", "other", "gone", "unseen")))
    ray.answers |= {"other": seeing(other), "gone": seeing(gone), "unseen": unseen}
    placement = placed(ray, FakeTask(journals=(journal,)), joined=True)
    assert set(filled(placement, CPU)) == {"same"}
    said = capsys.readouterr().err
    assert f"other is left out: {other.destination.journal} is another folder there than here" in said
    assert f"gone is left out: {gone.destination.journal} is not there" in said
    assert "unseen is left out: what it writes to" in said
    placement.close()
    for each in journal.destination.root.glob("asked-*"):  # type: ignore[attr-defined]
        each.unlink()  # of the machine whose name for it was hidden


def test_a_source_is_the_same_file_or_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.execution.ray.asking.AGAIN_S", 0.0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/w").write_bytes(b"123")
    planned = open_store(tmp_path / "a").find("w")
    assert planned is not None
    assert source_fault(open_store(tmp_path / "a"), [planned]) == ""
    assert source_fault(open_store(tmp_path), [planned]) == "w is not in the source there"
    longer = replace(planned, size=4)
    assert source_fault(open_store(tmp_path / "a"), [longer]) == "w has 3 bytes in the source there, 4 here"
    copied = replace(planned, tag=planned.tag.split()[0] + " 1")
    assert "w is a copy there" in source_fault(open_store(tmp_path / "a"), [planned, copied])
    older = replace(planned, tag="1 1")
    assert source_fault(open_store(tmp_path / "a"), [older]) == "w is of another version in the source there"


# --- machines that come, go and fail


def test_a_late_machine_is_asked_before_it_gets_work_and_nothing_waits_for_it() -> None:
    ray = FakeRay(node("a"))
    placement = placed(ray, joined=True)
    ray.rows.append(node("b"))
    ray.silent.add("b")
    placement.refresh(ray.nodes())
    assert set(filled(placement, CPU)) == {"a"}
    ray.silent.clear()
    placement.refresh(ray.nodes())
    assert set(filled(placement, CPU)) == {"a", "b"}
    ray.rows[1]["Alive"] = False
    placement.refresh(ray.nodes())
    assert set(filled(placement, CPU)) == {"a"}
    assert ray.asked == ["a", "b"]


def test_a_machine_on_which_a_unit_failed_is_asked_again() -> None:
    ray = FakeRay(node("a"), node("b"))
    placement = placed(ray, joined=True)
    assert placement.doubt("a")
    assert placement.is_out("a") is None
    assert set(filled(placement, CPU)) == {"b"}
    placement.refresh(ray.nodes())
    assert placement.is_out("a") is False  # it was the unit's fault
    assert placement.doubt("a")
    ray.answers["a"] = lambda question, settings: Answer(facts=Facts(), fault="read-only")
    placement.refresh(ray.nodes())
    assert placement.is_out("a")
    assert not placement.doubt("b"), "no other machine would do its units"
    assert placement.hopeless() is None


def test_a_machine_that_dies_while_it_is_asked_is_out() -> None:
    ray = FakeRay(node("a"), node("b"))
    placement = placed(ray, joined=True)
    ray.silent.add("a")
    placement.doubt("a")
    ray.rows[0]["Alive"] = False
    placement.refresh(ray.nodes())
    assert placement.is_out("a")


def test_when_no_machine_is_left_the_last_reason_is_said() -> None:
    ray = FakeRay(node("a"), node("b"))
    placement = placed(ray, joined=True)

    def dies(question: Question, settings: Any) -> Answer:
        raise FakeError("no space left")

    ray.answers |= {"a": dies}
    placement.doubt("a")
    ray.rows[1]["Alive"] = False
    assert placement.hopeless() is None
    placement.refresh(ray.nodes())
    assert placement.hopeless() == "no machine is left; the last was left out: FakeError: no space left"


def test_silent_machines_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(nodes, "ASK_S", 0.0)
    monkeypatch.setattr("jobs.execution.ray.placement.ASK_S", 0.0)
    ray = FakeRay(node("a"), node("b"))
    ray.silent.add("b")
    assert set(filled(placed(ray, joined=True), CPU)) == {"a"}
    assert "b is left out: no answer within" in capsys.readouterr().err


def test_a_job_begins_without_machines_that_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.execution.ray.placement.OTHERS_S", 0.2)
    monkeypatch.setattr("jobs.execution.ray.placement.PAUSE_S", 0.05)
    ray = FakeRay(node("a"), node("slow"), node("frozen"))
    ray.silent |= {"slow", "frozen"}
    began = time.monotonic()
    placement = placed(ray, joined=True)
    assert 0.2 <= time.monotonic() - began < 2
    assert "slow and frozen have not answered yet: others begin" in capsys.readouterr().err
    assert set(filled(placement, CPU)) == {"a"}
    ray.silent.remove("slow")
    placement.refresh(ray.nodes())
    assert set(filled(placement, CPU)) == {"a", "slow"}
    monkeypatch.setattr(nodes, "ASK_S", 0.0)
    placement.refresh(ray.nodes())
    assert "frozen is left out: no answer within" in capsys.readouterr().err
    assert ray.asked == ["a", "slow", "frozen"]


def test_of_machines_of_one_name_the_one_that_is_left_out_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay(*({**node(name), "NodeManagerHostname": "vm"} for name in ("a", "b")))
    running(ray, "b", python="3.9.1")
    placed(ray, joined=True)
    assert "vm (b) is left out: it has Python 3.9.1" in capsys.readouterr().err


# --- waiting for machines


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, float]]]:
    """What an autoscaler was asked for."""
    found: list[list[dict[str, float]]] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: found.append(bundles))
    monkeypatch.setattr(fitting, "LOOK_S", 0.01)
    return found


def heard(scaled: list[Any], count: int) -> None:
    """Wait until an autoscaler was asked for so many units."""
    deadline = time.monotonic() + 10
    while not (scaled and len(scaled[-1]) == count):
        assert time.monotonic() < deadline, scaled
        time.sleep(0.01)


def test_a_head_that_does_not_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked = threading.Event(), list[int]()

    def hangs(bundles: list[Any]) -> None:
        asked.append(len(bundles))
        answers.wait(20)

    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", hangs)
    monkeypatch.setattr(fitting, "HEARD_S", 0.05)
    scaling = Scaling(ClusterSpec(kind="ray", wait_s=10))
    began = time.monotonic()
    for count in (3, 2):
        scaling.want([{"CPU": 1}] * count)
    scaling.close()
    assert time.monotonic() - began < 10
    answers.set()
    deadline = time.monotonic() + 10
    while asked[-1:] != [0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked == [asked[0], 0], "the newest alone is asked for"


def test_machines_are_waited_for(scaled: list[list[dict[str, float]]], capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay()
    spec = ClusterSpec(kind="ray", wait_s=60)
    scaling = Scaling(spec)
    come, look = iter([[], [node("a", 8, 0.5)], [node("a", 8, 0.5), node("b", 8)]]), ray.nodes
    ray.nodes = lambda: next(come, None) or look()  # type: ignore[method-assign]
    ray.rows = [node("a", 8, 0.5), node("b", 8)]
    await_machines(ray, spec, scaling)
    check_fits(ray, spec, 4, [CPU], scaling)
    scaling.close()
    said = capsys.readouterr().err
    assert "waiting up to 60 s for a machine: a unit needs 4 CPUs and 1.31 GB of memory; the largest machine" in said
    assert scaled[-2:] == [[{"CPU": 4, "memory": int(1e9) + (300 << 20)}], []]


def test_waiting_ends_with_what_was_offered_and_needed(scaled: list[Any]) -> None:
    spec = ClusterSpec(kind="ray", wait_s=0.05, labels={"zone": "x"})
    with pytest.raises(BadSpec, match=r"no machine offers a CPU and the label zone=x \(waited 0 s\)"):
        await_machines(FakeRay(node("a", 8)), spec, Scaling(spec))
    assert scaled == [[{"CPU": 1}]]


def test_a_cluster_that_scales_is_asked_for_what_is_left(scaled: list[Any]) -> None:
    ray = FakeRay(node("a"))
    tasks = [FakeTask(number) for number in range(5)]
    placement = placed(ray, *tasks, joined=True, wait_s=10)
    for left in (5, 5, 2):
        placement.refresh(ray.nodes(), left)
        heard(scaled, left)
    placement.close()
    assert [len(bundles) for bundles in scaled] == [5, 2, 0]


def test_nothing_is_asked_of_a_cluster_that_is_not_waited_for(scaled: list[Any]) -> None:
    ray = FakeRay(node("a"))
    placement = placed(ray, joined=True)
    placement.refresh(ray.nodes(), 1)
    placement.close()
    assert scaled == []


# --- what waits


def test_units_of_one_kind_do_not_wait_for_room_of_the_other() -> None:
    sized = [replace(task, number=n, source_bytes=8) for n, task in enumerate([GPU, CPU, GPU, CPU, CPU])]
    waiting = Waiting(sized)
    assert [[task.number for task in tasks] for tasks in waiting.next(room=1)] == [[0], [1]]
    waiting.take([sized[0]])
    assert [[task.number for task in tasks] for tasks in waiting.next(room=1)] == [[2], [1]]
    waiting.take([sized[2]])
    assert [[task.number for task in tasks] for tasks in waiting.next(room=1)] == [[1]]
    assert len(waiting) == 3


def test_small_units_share_a_ray_task() -> None:
    small = Waiting([FakeTask(n, source_bytes=1000) for n in range(200)])
    [tasks] = small.next(room=2)
    assert [task.number for task in tasks] == list(range(16))
    assert [len(tasks) for tasks in small.next(room=20)] == [5]
    large = Waiting([FakeTask(n, source_bytes=40 << 20) for n in range(200)])
    assert [len(tasks) for tasks in large.next(room=2)] == [1]
