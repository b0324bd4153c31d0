"""On Ray: the same bytes, and nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.execution import ray_cluster
from tests.making import snapshot, write_checkpoint
from tests.processes import start

REPORT = "weightmill.json"
MARK = "WEIGHTMILL_TEST_MARK"


def start_job(source: Path, out: Path, *extra: str, mark: str = "") -> subprocess.Popen[str]:
    given = (f"model.path={source}", f"output.path={out}", "tracking=none", "source.unit_mb=0.05", *extra)
    return start("-m", "jobs.run", *given, environment={MARK: mark})


def marked(mark: str) -> list[str]:
    """Processes that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " ")[:100])
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_ray_and_this_process_give_the_same_bytes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    found = []
    for cluster in ("local", "ray"):
        process = start_job(source, tmp_path / cluster, f"cluster={cluster}", mark="same")
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        report = json.loads((tmp_path / cluster / REPORT).read_text())
        assert ("Ray, started here" in report["run"]["cluster"]) == (cluster == "ray")
        del report["run"]
        found.append((snapshot(tmp_path / cluster, ignore=[REPORT]), report))
    assert found[0] == found[1]
    time.sleep(3)
    assert marked("same") == []


@pytest.mark.skipif(sys.platform != "linux", reason="Ray takes TMPDIR on Linux alone")
@pytest.mark.parametrize(("folder", "goes"), [("/tmp/" + 38 * "x", True), ("/tmp/" + 33 * "x", False)])
def test_a_long_path_of_temporary_files_is_not_rays(
    folder: str, goes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "")
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", folder)
    ray_cluster._keep_sockets_short()
    assert os.environ.get("RAY_TMPDIR") == ("/tmp" if goes else None)
    assert ("Ray's files go to /tmp" in capsys.readouterr().err) == goes


@pytest.mark.slow
def test_a_gate_fails_on_ray_as_it_does_here(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    process = start_job(source, tmp_path / "out", "cluster=ray", "verify.max_relative_error=0.001")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1, err
    assert "not published" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_more_threads_than_any_machine_has_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    process = start_job(source, tmp_path / "out", "cluster=ray", "cluster.threads=1000")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2, err
    assert "a unit needs 1000 CPUs" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_and_no_half_file(number: signal.Signals, tmp_path: Path) -> None:
    from tests.journals import find_journals

    source = write_checkpoint(tmp_path / "source", shards=2)
    mark = f"stop{int(number)}"
    process = start_job(source, tmp_path / "out", "cluster=ray", "source.unit_mb=0.001", mark=mark)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(list((j / "records").glob("*.json")) for j in find_journals(tmp_path)):
            break
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    time.sleep(3)
    assert marked(mark) == []
    [journal] = find_journals(tmp_path)
    assert list((journal / "parts").iterdir()) == []
    process = start_job(source, tmp_path / "out", "cluster=local", "source.unit_mb=0.001")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err


def _runs_a_unit(process: Path, mark: str) -> bool:
    is_unit = b"ray::unit" in (process / "cmdline").read_bytes()
    return is_unit and f"{MARK}={mark}".encode() in (process / "environ").read_bytes()


def kill_a_worker(mark: str, process: subprocess.Popen[str]) -> bool:
    """SIGKILL the first process that is running a unit."""
    while process.poll() is None:
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and _runs_a_unit(folder, mark):
                    os.kill(int(folder.name), signal.SIGKILL)
                    return True
            except OSError:
                continue
        time.sleep(0.002)
    return False


@pytest.mark.slow
def test_a_killed_worker_costs_one_unit(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    process = start_job(source, tmp_path / "here", "cluster=local")
    assert process.communicate(timeout=600)
    assert process.returncode == 0
    process = start_job(source, tmp_path / "there", "cluster=ray", "cluster.threads=1", mark="killed")
    assert kill_a_worker("killed", process)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, (out, err)
    found = [snapshot(tmp_path / name, ignore=[REPORT]) for name in ("here", "there")]
    assert found[0] == found[1]
