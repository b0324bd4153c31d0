"""Jobs to which something happens in the middle: a unit fails when its turn comes, or the world changes before it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import jobs.execution.unit


def fail_at(patch: pytest.MonkeyPatch, number: int, error: BaseException | None = None) -> list[str]:
    """Let the unit that is run as this `number` fail, by `ValueError("a bug")` if no other error is given.

    The list that is returned fills with the ids of the units that are run, that one and later ones included.
    """
    honest, ran = jobs.execution.unit.run_unit, list[str]()

    def failing(task: Any, on_bytes: Any, stop: Any) -> Any:
        ran.append(task.unit.id)
        if len(ran) == number:
            raise ValueError("a bug") if error is None else error
        return honest(task, on_bytes, stop)

    patch.setattr(jobs.execution.unit, "run_unit", failing)
    return ran


def at_first_unit(patch: pytest.MonkeyPatch, then: Callable[[], Any]) -> None:
    """Do something once the first unit begins, when everything is planned."""
    honest, lock, begun = jobs.execution.unit.run_unit, threading.Lock(), threading.Event()

    def run(task: Any, on_bytes: Any, stop: Any) -> Any:
        with lock:
            if not begun.is_set():
                begun.set()
                then()
        return honest(task, on_bytes, stop)

    patch.setattr(jobs.execution.unit, "run_unit", run)
