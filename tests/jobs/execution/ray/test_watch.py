"""What the driver learns of machines and of the head, and what it does when that is silent."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.execution.cluster import ClusterLost
from jobs.execution.ray import watch as watching
from jobs.execution.ray.cluster import within
from jobs.execution.ray.watch import Watch
from loaders.places import ROOT

pytestmark = pytest.mark.quick


class Ray:
    """A head that may be silent, and two machines."""

    def __init__(self) -> None:
        self.alive = {"a": True, "b": True, "old": False}
        self.draining: dict[str, int] = {}
        self.is_silent = False
        client = SimpleNamespace(check_alive=self._check_alive)
        state = SimpleNamespace(
            state=SimpleNamespace(get_draining_nodes=lambda: self.draining),
            available_resources_per_node=lambda: {"a": {"CPU": 1.0}},
        )
        self._private = SimpleNamespace(worker=SimpleNamespace(global_worker=SimpleNamespace(gcs_client=client)),
                                        state=state)  # fmt: skip

    def _check_alive(self, nodes: Any, timeout: float) -> list[bool]:
        if self.is_silent:
            raise ConnectionError("Timed out while waiting for GCS to become available.")
        return []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": alive} for name, alive in self.alive.items()]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    monkeypatch.setattr(watching, "WATCH_S", 0.01)
    return Ray()


def until(holds: Any) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_machines_that_die_or_will_leave_are_noticed_and_those_that_were_dead_are_not(ray: Ray) -> None:
    watch = Watch(ray, "the Ray cluster at h:1")
    ray.alive["b"], ray.draining = False, {"a": 0}
    until(lambda: watch.leaving)
    assert {*watch.dead} == {"b"}
    assert watch.leaving == {"a"}
    assert watch.available == {"a": {"CPU": 1.0}}
    watch.check()
    watch.close()


def test_a_silent_head_ends_the_job_by_name(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(ray, "the Ray cluster at h:1")
    ray.is_silent = True
    monkeypatch.setattr(watching, "SILENT_S", 0.2)
    until(lambda: watch.silent_s > 0.2)
    with pytest.raises(ClusterLost, match="the head of the Ray cluster at h:1 has not answered for 0 s"):
        watch.check()
    watch.close()


def test_a_head_that_is_silent_between_two_phases_is_waited_for(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "ASK_S", 0.1)
    watch = Watch(ray, "the Ray cluster at h:1")
    watch.await_head()
    ray.is_silent = True
    until(lambda: watch.silent_s > 0.2)
    threading.Timer(0.2, lambda: setattr(ray, "is_silent", False)).start()
    watch.await_head()
    assert watch.silent_s < 0.2
    ray.is_silent = True
    monkeypatch.setattr(watching, "SILENT_S", 0.3)
    until(lambda: watch.silent_s > 0.2)
    with pytest.raises(ClusterLost, match="has not answered"):
        watch.await_head()
    watch.close()


HANGING = """
import time, jobs.cli.early as early, jobs.execution.ray.watch as watching
from tests.jobs.execution.ray.test_watch import Ray
early.be_program()
watching.WATCH_S, watching.EXIT_S = 0.01, 0.2
ray = Ray()
watch = watching.Watch(ray, "the Ray cluster at h:1")
ray.is_silent = True
time.sleep(60)  # in a call of Ray that does not return
"""


def test_a_program_that_hangs_in_ray_while_the_head_is_silent_ends_all_the_same() -> None:
    ran = subprocess.run([sys.executable, "-c", HANGING], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert ran.returncode == 1
    assert ran.stderr == (
        "weightmill: failed: cluster: the head of the Ray cluster at h:1 has not answered for 0 s; run the same command"
        " against a cluster\n"
    )


def test_what_never_returns_is_not_waited_for() -> None:
    began = time.monotonic()
    within(0.05, lambda: time.sleep(5))
    within(5, lambda: None)
    assert time.monotonic() - began < 4
