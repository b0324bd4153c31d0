"""What a worker tells of its units; it needs no Ray for that."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.execution.cluster import UnitFailed
from jobs.execution.ray import worker
from jobs.execution.ray.worker import SIGN_BYTES, News, run_remotely
from loaders.errors import StorageError
from loaders.storage.settings import current
from loaders.storage.traffic import traffic


@dataclass(frozen=True)
class Report:
    unit: str
    attempts: int = 1


@dataclass(frozen=True)
class Task:
    name: str
    does: Callable[[Any, threading.Event], None] = lambda on_bytes, stop: on_bytes(7)

    @property
    def unit(self) -> Any:
        return SimpleNamespace(id=self.name)

    def run(self, on_bytes: Any, stop: threading.Event) -> Report:
        self.does(on_bytes, stop)
        return Report(self.name)


@pytest.fixture(autouse=True)
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "be_program", lambda: None)


def told(*tasks: Task, every_s: float = 0.02) -> list[list[tuple[str, Any]]]:
    return list(run_remotely(tasks, current(), every_s))  # type: ignore[arg-type]


def kinds(messages: list[list[tuple[str, Any]]], *wanted: str) -> list[tuple[str, Any]]:
    return [(kind, value) for message in messages for kind, value in message if kind in wanted]


def test_small_units_are_told_in_one_message_and_in_order() -> None:
    messages = told(*(Task(f"unit-{number}") for number in range(20)), every_s=5.0)
    assert len(messages) == 2
    assert [kind for kind, _ in messages[0]] == ["began"]
    expected: list[tuple[str, Any]] = []
    for number in range(20):
        expected += [("unit", f"unit-{number}"), ("bytes", 7), ("outcome", Report(f"unit-{number}"))]
    assert kinds(messages, "unit", "bytes", "outcome") == expected


def test_a_failed_unit_does_not_end_the_others() -> None:
    def fails(*_: Any) -> None:
        raise StorageError("the disk is full")

    def breaks(*_: Any) -> None:
        raise ZeroDivisionError("of nothing\nsecond line")

    messages = told(Task("a", fails), Task("b", breaks), Task("c"))
    outcomes = [value for _, value in kinds(messages, "outcome")]
    assert outcomes == [
        UnitFailed("a", "the disk is full"), UnitFailed("b", "ZeroDivisionError: of nothing"), Report("c")
    ]  # fmt: skip


def test_bytes_that_are_only_read_back_or_uploaded_are_signs_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = [0]
    monkeypatch.setattr(worker, "touched_bytes", lambda: touched[0])
    news = News()
    assert news.take() == []
    touched[0] += SIGN_BYTES - 1  # of Ray's own threads
    assert news.take() == []
    touched[0] += 1
    assert news.take() == [("sign", None)]
    assert news.take() == []
    traffic("elsewhere").moved(uploaded=5)
    assert news.take() == [("moved", {"fetched": 0, "uploaded": 5})]


def test_a_thread_that_only_lives_gives_no_sign() -> None:
    def hangs(on_bytes: Any, stop: threading.Event) -> None:
        time.sleep(0.3)

    messages = told(Task("a", hangs))
    assert Counter(kind for message in messages[1:] for kind, _ in message) == {"unit": 1, "outcome": 1}


def test_memory_that_runs_short_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [100]
    monkeypatch.setattr(worker, "total_memory", lambda: 100)
    monkeypatch.setattr(worker, "free_memory", lambda: free[0])
    news, found = News(), []
    for free[0] in (100, 9, 8, 50):
        found.append(news.take())
    assert found == [[], [("short", True)], [], [("short", False)]]


def test_a_cancelled_worker_stops_its_unit_and_begins_no_other() -> None:
    stopped, begun = threading.Event(), threading.Event()

    def waits(on_bytes: Any, stop: threading.Event) -> None:
        begun.set()
        assert stop.wait(10)
        stopped.set()

    stream = run_remotely([Task("a", waits), Task("b")], current(), 0.01)  # type: ignore[list-item]
    next(stream)
    said = next(stream)
    assert begun.wait(10)
    stream.close()  # type: ignore[attr-defined]
    assert stopped.is_set()
    assert said[0] == ("unit", "a")


def test_compiling_is_told() -> None:
    from numba.core import event

    def compiles(on_bytes: Any, stop: threading.Event) -> None:
        event.broadcast(event.Event("numba:compile", event.EventStatus.START))  # type: ignore[no-untyped-call]
        time.sleep(0.05)
        on_bytes(1)

    messages = told(Task("a", compiles))
    assert [kind for kind, _ in kinds(messages, "compiling", "bytes")] == ["compiling", "bytes"]
