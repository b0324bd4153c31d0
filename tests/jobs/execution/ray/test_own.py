"""A Ray cluster that is started here serves nobody else: loopback only, a token of its own, a folder of its own."""

from __future__ import annotations

import ipaddress
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from jobs.execution.ray import own as own_ray
from jobs.execution.ray.own import LONGEST_FOLDER, OwnRay
from loaders.errors import StorageError
from tests.processes import start

MARK = "WEIGHTMILL_TEST_MARK"
# Starts a cluster and a worker, prints where they are, and stops the cluster when it is told so.
SERVING = """
import json, os, sys
from jobs.execution.ray.cluster import RayCluster
from jobs.spec.cluster import ClusterSpec
cluster = RayCluster(ClusterSpec(kind="ray"), None)
import ray
ray.get(ray.remote(lambda: None).remote())
said = {"address": ray.get_runtime_context().gcs_address, "folder": str(cluster._own.folder)}
print(json.dumps({**said, "token": os.environ["RAY_AUTH_TOKEN"]}), flush=True)
sys.stdin.readline()
cluster.close()
print(json.dumps([os.path.exists(said["folder"]), os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN")]))
"""
STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("ran in", ray.get(ray.remote(lambda: "the job").remote()), flush=True)
"""


def listening(mark: str) -> dict[str, set[str]]:
    """The addresses on which processes listen that have a mark in their environment, by the processes' names."""
    found: dict[str, set[str]] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                here = {each.laddr.ip for each in process.net_connections("tcp") if each.status == "LISTEN"}
                found.setdefault(process.name(), set()).update(here)
        # It has ended meanwhile, or is another user's.
        except psutil.Error:
            continue
    return {name: here for name, here in found.items() if here}


@pytest.fixture(scope="module")
def serving() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    process = start("-c", SERVING, environment={MARK: "own"}, stdin=subprocess.PIPE)
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_cluster_of_ours_is_reached_by_nobody_else(serving: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    process, about = serving
    found = listening("own")
    assert {"gcs_server", "raylet"} <= {*found}
    hosts = {ipaddress.ip_address(each.removeprefix("::ffff:")) for here in found.values() for each in here}
    assert all(each.is_loopback for each in hosts), found
    folder = Path(about["folder"]).stat()
    assert (stat.S_IMODE(folder.st_mode), folder.st_uid) == (0o700, os.getuid())

    strangers: dict[str, dict[str, str]] = {
        "without a token": {"RAY_AUTH_MODE": "disabled"},
        "with another token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        "with ours": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": about["token"]},
    }
    # Of itself, Ray would look at another interface, and ask 20 times whether its token is right by now.
    settings = {own_ray.LOOPBACK: "0", "RAY_NUM_REDIS_GET_RETRIES": "2"}
    given = [start("-c", STRANGER, about["address"], environment={**each, **settings}) for each in strangers.values()]
    said = dict(zip(strangers, [each.communicate() for each in given], strict=True))
    assert "InvalidAuthToken" in said["without a token"][1]
    ran = {name: "ran in the job" in out for name, (out, _) in said.items()}
    assert ran == {"without a token": False, "with another token": False, "with ours": True}, said

    assert process.stdin
    assert process.stdout
    process.stdin.write("stop\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == [False, None, None]


def test_health_checks_are_set_unless_the_user_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_health_check_period_ms", "1234")
    own = OwnRay()
    found = {name: os.environ.get(name) for name in own_ray.HEALTH}
    own.close()
    assert found == {**own_ray.HEALTH, "RAY_health_check_period_ms": "1234"}
    left = {name: value for name, value in os.environ.items() if name in own_ray.HEALTH}
    assert left == {"RAY_health_check_period_ms": "1234"}


def test_a_token_of_the_users_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    users = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "theirs", "RAY_AUTH_TOKEN_PATH": "/a/file"}
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    first, second = OwnRay(), OwnRay()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    second.close()
    first.close()
    assert {name: os.environ[name] for name in users} == users
    assert len([*tmp_path.iterdir()]) == 2  # RAY_TMPDIR was named to look into it


@pytest.mark.parametrize(
    ("address", "is_ours"), [("127.0.0.1:6379", True), ("[::1]:6379", True), ("192.0.2.2:1", False)]
)
def test_a_cluster_that_others_reach_is_refused(address: str, is_ours: bool) -> None:
    own = object.__new__(OwnRay)
    if is_ours:
        own.check(address)
        return
    with pytest.raises(StorageError, match="Ray listens at 192.0.2.2, which others reach"):
        own.check(address)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the temporary folder is always too long")
@pytest.mark.parametrize("length", [LONGEST_FOLDER, LONGEST_FOLDER + 1])
def test_a_long_path_of_temporary_files_is_not_rays(
    length: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = "/tmp/" + "x" * (length - 5)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", folder)
    goes = length > LONGEST_FOLDER
    assert own_ray._short_enough() == ("/tmp" if goes else folder)
    assert ("Ray's files go to /tmp" in capsys.readouterr().err) == goes


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(StorageError, match=r"cluster: Ray needs a folder .*missing is none \(No such file"):
        OwnRay()


@pytest.mark.parametrize("there", ["missing", "small", "read-only"])
def test_without_shared_memory_rays_store_lies_in_our_folder(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    shared = tmp_path / "shm"
    if there != "missing":
        shared.mkdir()
    free = 10 if there == "small" else 1 << 40
    about: Any = SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr(own_ray, "SHARED", shared)
    if there != "missing":
        monkeypatch.setattr(os, "statvfs", lambda _: about)
    if there == "read-only":
        monkeypatch.setattr(os, "access", lambda *_: False)
    own = OwnRay()
    assert own.options.get("_plasma_directory") == str(own.folder)
    own.close()


def test_why_ray_does_not_start_is_in_its_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    own = OwnRay()
    assert own.reason(Exception("The node timed out")) == "The node timed out"
    logs = own.folder / own_ray.WITHIN / "session_2026-01-31" / "logs"
    logs.mkdir(parents=True)
    (logs / "gcs_server.err").write_text("")
    (logs / "raylet.err").write_text(
        "[2026-11-28 01:14:19,806 C 28978 28988] (raylet) failed to open file\n*** Stack\n"
    )
    assert own.reason(Exception("The node timed out")) == "(raylet) failed to open file"
    own.close()
