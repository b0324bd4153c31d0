"""Nothing that a job has started outlives its driver, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.execution.ray import processes
from jobs.execution.ray.processes import MARK, end_remotely, guard

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody sees the environment of processes"),
]
SLEEPS = "import time; print('there', flush=True); time.sleep(100)"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process of our cluster, a stopped one, one of another cluster whose folder's name begins alike, and another."""
    folder = tmp_path / "ray-1"
    folder.mkdir()
    marks = {"ours": str(folder), "stopped": str(folder), "theirs": f"{folder}2", "other": None}
    made = {
        name: subprocess.Popen(
            [sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **({} if mark is None else {MARK: mark})},
        )
        for name, mark in marks.items()
    }  # fmt: skip
    for each in made.values():
        assert each.stdout
        assert each.stdout.readline()
    made["stopped"].send_signal(signal.SIGSTOP)
    yield made
    for each in made.values():
        each.kill()
        each.communicate()


def test_the_guard_kills_what_bears_the_mark_once_its_driver_is_gone(
    started: dict[str, subprocess.Popen[str]], tmp_path: Path
) -> None:
    guarding = guard(tmp_path / "ray-1", keep=False)
    time.sleep(0.3)
    assert [each.poll() for each in started.values()] == [None] * 4
    assert guarding.stdin
    guarding.stdin.close()  # as when the driver is killed
    assert [started[name].wait(20) for name in ("ours", "stopped")] == [-signal.SIGKILL] * 2
    assert guarding.wait(20) == 0
    assert [started[name].poll() for name in ("theirs", "other")] == [None, None]
    assert not (tmp_path / "ray-1").exists()


def test_a_folder_that_a_user_wants_to_look_into_stays(tmp_path: Path) -> None:
    guarding = guard(tmp_path, keep=True)
    guarding.communicate()
    assert tmp_path.exists()


def test_only_the_worker_of_a_task_is_ended(
    started: dict[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    title = Path(f"/proc/{started['stopped'].pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    end_remotely("unit-00001.01234567")
    end_remotely(title)  # it is no worker
    assert started["stopped"].poll() is None
    monkeypatch.setattr(processes, "WORKER", title[:3].encode())
    end_remotely(title[3:-1])
    assert started["stopped"].poll() is None
    end_remotely(title[3:])
    assert started["stopped"].wait(20) == -signal.SIGKILL
    end_remotely(title[3:])  # it is gone by now
