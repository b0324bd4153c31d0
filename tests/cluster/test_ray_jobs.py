"""deploy/ray-job: `ray job submit` to a cluster whose head has `ray[default]`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loaders.places import ROOT
from tests.cluster.cluster import hashed, wait_for
from tests.cluster.hosts import Host, Network
from tests.cluster.model import SETTINGS
from tests.kinds_of_jobs import hidden

BIN = Path(sys.executable).parent
ADDRESS = "http://127.0.0.1:8265"


@pytest.fixture
def head(folder: Path) -> Iterator[Host]:
    if find_spec("aiohttp_cors") is None:
        pytest.skip("ray[default], whose head takes jobs, is not installed")
    network = Network(folder / "jobs")
    try:
        host = network.add(1)
        host.environment = {
            "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0" * 64, "RAY_API_SERVER_ADDRESS": ADDRESS,
        }  # fmt: skip
        host.run("ray", "start", "--head", f"--node-ip-address={host.address}", "--num-cpus=1", "--disable-usage-stats",
                 "--object-store-memory=100000000")  # fmt: skip
        yield host
    finally:
        network.close()
        shutil.rmtree(network.folder, ignore_errors=True)


@pytest.mark.cluster
def test_a_submitted_job_is_stopped_goes_on_and_says_what_is_wrong(head: Host, model: Any, tmp_path: Path) -> None:
    out = tmp_path / "o" / "out"
    settings = (f"model.path={model.folder}", f"output.path={out}", *SETTINGS, "tracking=none")

    def submit(number: int, *words: str) -> subprocess.Popen[str]:
        return head.start(
            "ray", "job", "submit", f"--submission-id=job{number}", f"--working-dir={ROOT}",
            f"--runtime-env={ROOT / 'deploy' / 'ray-job' / 'runtime_env.yaml'}", "--",
            "python", "-m", "jobs.run", "cluster=ray", *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    first = submit(1, *settings)
    wait_for(lambda: first.poll() is not None or len([*out.parent.glob(".out*/records/*.json")]) > 1, 120, "two units")
    head.run("ray", "job", "stop", "job1")
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 0, said  # Ray's, and the page says so
    assert "units are done and kept" in said
    assert "was stopped" in said
    assert [*out.parent.glob(".out*/parts/*")] == []

    again = submit(2, *settings)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert "were done before" in said
    assert hashed(out.parent) == model.wanted
    assert hidden(out.parent) == []

    refused = submit(3, "model.path=/nowhere")
    said, _ = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert "failed with exit code 2" in said
    assert "expected a folder of weights at /nowhere" in said
