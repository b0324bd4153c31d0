"""deploy/kubernetes, as far as it runs without Kubernetes: its environment, its user, its read-only root, its hooks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from loaders.places import ROOT
from tests.cluster.cluster import hashed, wait_for
from tests.cluster.hosts import Host, Network
from tests.cluster.model import SETTINGS
from tests.kinds_of_jobs import hidden
from tests.other_users import becoming

FOLDER = ROOT / "deploy" / "kubernetes"
WRITES = "/tmp/ray"  # the one folder of a host that is its own, in the place of the pod's /tmp
PORT = 6379


@pytest.fixture
def pod(folder: Path) -> Iterator[Host]:
    """A host of which only one folder can be written."""
    becoming()  # skips where nobody can
    network = Network(folder / "pod")
    try:
        host = network.add(1)
        host.run("chmod", "1777", WRITES)
        host.run("mount", "-o", "remount,size=256m", "/dev/shm")
        host.run("mount", "-o", "remount,bind,ro", "/")
        yield host
    finally:
        network.close()
        shutil.rmtree(network.folder, ignore_errors=True)


@pytest.fixture
def within(pod: Host) -> Callable[..., subprocess.Popen[str]]:
    """A function that starts a command in the pod, as its user, with the image's environment and no other."""
    [words] = re.findall(r"^ENV (.*)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    image = dict(word.split("=", 1) for word in words.split())
    assert image["HOME"] == "/tmp"
    given = {
        **image, "HOME": WRITES, "TMPDIR": WRITES, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64,
    }  # fmt: skip

    def start(*command: str) -> subprocess.Popen[str]:
        variables = [f"{name}={value}" for name, value in given.items()]
        return pod.start(
            *becoming(), "env", "--ignore-environment", f"--chdir={WRITES}", *variables, *command,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


@pytest.mark.cluster
def test_a_pod_of_any_user_runs_a_job_stops_it_when_it_is_told_and_goes_on(
    pod: Host, within: Callable[..., subprocess.Popen[str]], model: Any
) -> None:
    groups = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    head, worker = groups["headGroupSpec"], groups["workerGroupSpecs"][0]

    def hook(group: dict[str, Any]) -> list[str]:
        command = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        return [str(word) for word in command]

    told = {**head["rayStartParams"], "num-cpus": "1", "port": str(PORT), "node-ip-address": pod.address}
    ray = within("ray", "start", "--head", "--include-dashboard=false", *(f"--{name}={told[name]}" for name in told))
    said, _ = ray.communicate(timeout=120)
    assert ray.returncode == 0, said

    there = pod.folder / "ray" / "outputs"
    job = ("weightmill", "run", "cluster=ray", f"cluster.address={pod.address}:{PORT}", "cluster.ship_code=false",
           f"model.path={model.folder}", f"output.path={WRITES}/outputs/out", *SETTINGS, "tracking=none")  # fmt: skip
    first = within(*job)
    wait_for(lambda: first.poll() is not None or len(list(there.glob(".out*/records/*.json"))) > 1, 120, "two units")
    stopping = within(*hook(head))
    stopping.communicate(timeout=60)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "units are done and kept" in said

    again = within(*job)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert "were done before" in said
    assert hashed(there) == model.wanted
    assert hidden(there) == []
    kernels = pod.folder / "ray" / ".cache" / "weightmill" / "kernels"
    assert any(kernels.iterdir())

    within(*hook(worker)).communicate(timeout=60)
    wait_for(lambda: pod.processes == [], 30, "all to end")
