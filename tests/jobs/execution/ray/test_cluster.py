"""On Ray: the same bytes, and nothing left running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from loaders.places import ROOT
from loaders.storage.address import Address
from tests.making import snapshot, write_checkpoint
from tests.processes import start
from tests.shelf.places import ObjectPlace, fill

REPORT = "weightmill.json"
MARK = "WEIGHTMILL_TEST_MARK"


def arguments(source: Path, out: Path) -> list[str]:
    return [f"model.path={source}", f"output.path={out}", "tracking=none", "unit_mb=0.05"]


def start_job(source: Path, out: Path, *extra: str, mark: str) -> subprocess.Popen[str]:
    return start("-m", "jobs.run", *arguments(source, out), *extra, environment={MARK: mark})


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


def wait_until_gone(mark: str) -> list[str]:
    """What is left of the processes with a mark, once they had half a minute to end: Ray's agents look now and then."""
    deadline = time.monotonic() + 30
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return marked(mark)


@pytest.mark.slow
def test_a_sweep_on_ray_writes_what_this_process_writes_and_stops_at_the_gate_as_it_does(
    tmp_path: Path, weightmill: Any
) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    process = start("-m", "jobs.run", "-m", f"model.path={source}", f"output.root={tmp_path / 'o'}", "tracking=none",
                    "unit_mb=0.05", "cluster=ray", "verify.max_relative_error=null,0.001",
                    environment={MARK: "sweep"})  # fmt: skip
    said, err = process.communicate(timeout=600)
    assert process.returncode == 1, err
    assert "not published" in said
    assert "Traceback" not in said + err
    [out] = (tmp_path / "o").glob("source-*")
    assert weightmill("run", *arguments(source, tmp_path / "here"), "cluster=local").status == 0
    reports = [json.loads((folder / REPORT).read_text()) for folder in (out, tmp_path / "here")]
    assert ["Ray, started here" in report["run"].pop("cluster") for report in reports] == [True, False]
    assert snapshot(out, ignore=[REPORT]) == snapshot(tmp_path / "here", ignore=[REPORT])
    assert {**reports[0], "run": None} == {**reports[1], "run": None}
    assert wait_until_gone("sweep") == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_and_no_half_file(
    number: signal.Signals, tmp_path: Path, weightmill: Any
) -> None:
    from tests.journals import find_journals

    source = write_checkpoint(tmp_path / "source", shards=2)
    mark = f"stop{int(number)}"
    process = start_job(source, tmp_path / "out", "cluster=ray", "unit_mb=0.001", mark=mark)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(list((j / "records").glob("*.json")) for j in find_journals(tmp_path)):
            break
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert wait_until_gone(mark) == []
    [journal] = find_journals(tmp_path)
    assert list((journal / "parts").iterdir()) == []
    ran = weightmill("run", *arguments(source, tmp_path / "out"), "cluster=local", "unit_mb=0.001")
    assert ran.status == 0, ran.err


def _runs_a_unit(process: Path, mark: str) -> bool:
    is_unit = b"ray::unit" in (process / "cmdline").read_bytes()
    return is_unit and f"{MARK}={mark}".encode() in (process / "environ").read_bytes()


def to_a_worker(mark: str, process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Send a signal to the first process that is running a unit."""
    while process.poll() is None:
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and _runs_a_unit(folder, mark):
                    os.kill(int(folder.name), number)
                    return True
            except OSError:
                continue
        time.sleep(0.002)
    return False


@pytest.mark.cluster
def test_a_killed_worker_costs_one_unit(tmp_path: Path, weightmill: Any) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    assert weightmill("run", *arguments(source, tmp_path / "here"), "cluster=local").status == 0
    process = start_job(source, tmp_path / "there", "cluster=ray", "cluster.threads=1", mark="killed")
    assert to_a_worker("killed", process, signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, (out, err)
    found = [snapshot(tmp_path / name, ignore=[REPORT]) for name in ("here", "there")]
    assert found[0] == found[1]


# Patience for units of milliseconds. Before the first bytes, it must last for the start of a worker. Nothing is run a
# second time for being slow, which would be sooner than for being stuck.
IMPATIENT = """
import sys
import jobs.execution.ray.pace as pace
pace.STUCK_S, pace.FIRST_S, pace.SHORTEST_S = 3.0, 15.0, float("inf")
from jobs.run import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_worker_that_is_frozen_for_good_costs_one_unit(tmp_path: Path, weightmill: Any) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    assert weightmill("run", *arguments(source, tmp_path / "here"), "cluster=local").status == 0
    process = start(
        "-c", IMPATIENT, *arguments(source, tmp_path / "there"), "cluster=ray", "cluster.threads=1",
        environment={MARK: "frozen"},
    )  # fmt: skip
    assert to_a_worker("frozen", process, signal.SIGSTOP)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "has made no progress for" in err
    found = [snapshot(tmp_path / name, ignore=[REPORT]) for name in ("here", "there")]
    assert found[0] == found[1]
    assert wait_until_gone("frozen") == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_nothing_of_ray_outlives_a_killed_driver(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    process = start(
        "-m", "jobs.run", *arguments(source, tmp_path / "out"), "cluster=ray", "unit_mb=0.001",
        environment={MARK: "outlived", "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert to_a_worker("outlived", process, signal.SIGSTOP)
    process.kill()
    process.communicate()
    began = time.monotonic()
    assert wait_until_gone("outlived") == []
    assert time.monotonic() - began < 10
    assert list(tmp_path.glob("ray-*")) == []


# In the place of Python's own: a worker of Ray cuts the first shard as soon as it has mapped it.
CUTS = """
import mmap, os, sys
if any("default_worker" in word for word in sys.orig_argv):
    class Cut(mmap.mmap):
        def __new__(cls, descriptor, *given, **named):
            made = super().__new__(cls, descriptor, *given, **named)
            path = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else ""
            if path.endswith("00001-of-00002.safetensors"):
                os.truncate(path, 4096)
            return made
    mmap.mmap = Cut
"""


@pytest.mark.slow
def test_a_file_that_is_cut_while_a_worker_maps_it_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CUTS)
    process = start(
        "-m", "jobs.run", *arguments(source, tmp_path / "out"), "cluster=ray", "strategy=lazy", "cluster.threads=1",
        environment={MARK: "cut", "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"},
    )  # fmt: skip
    _, err = process.communicate(timeout=600)
    assert (source / "model-00001-of-00002.safetensors").stat().st_size == 4096
    assert process.returncode == 1, err
    assert "weightmill: failed: " in err
    # The worker ended by name; another took up its unit, and saw what had become of the file.
    assert re.search("model-00001-of-00002.safetensors: .*it (changed|was cut short) while it was read", err)
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert wait_until_gone("cut") == []


@pytest.mark.slow
def test_a_machine_that_does_not_reach_the_source_is_left_out_by_name(
    s3_bucket: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines, one of which has another endpoint in its environment, where nothing listens."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    source = fill(ObjectPlace(s3_bucket / tmp_path.name), write_checkpoint(tmp_path / "source", shards=2), "model")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            other = cluster.add_node(num_cpus=1)
        process = start_job(
            Path(), tmp_path / "out", f"model.path={source}", f"cluster.address={cluster.address}", "cluster=ray",
            "cluster.threads=1", "cluster.ship_code=true", "store.patience_s=1", mark="left-out",
        )  # fmt: skip
        out, err = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, (out, err)
    assert f"({other.node_id[:8]}) is left out: looking at s3://" in err
    assert err.count("is left out") == 1
