"""deploy/ssh: Ray on hosts by SSH, with real servers of it."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.output.journal import record_from
from loaders.places import ROOT
from tests.cluster.cluster import hashed
from tests.cluster.hosts import Host, Network
from tests.cluster.model import SETTINGS
from tests.kinds_of_jobs import hidden

BIN = Path(sys.executable).parent
SERVER = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
SetEnv HOME={folder}
"""
CLIENT = """
Host host*
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/known
    StrictHostKeyChecking accept-new
    LogLevel ERROR
"""


@pytest.fixture
def hosts(folder: Path) -> Iterator[list[Host]]:
    """Three hosts with an SSH server each, and with one home for all."""
    lacks = [each for each in ("sshd", "ssh", "ssh-keygen") if shutil.which(each) is None]
    if lacks:
        pytest.skip(f"{', '.join(lacks)}, of Debian's openssh-server and openssh-client, are not installed")
    network = Network(folder / "ssh")
    at = network.folder
    try:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", at / "key"], check=True)
        (at / "server").write_text(SERVER.format(folder=at))
        (at / "client").write_text(CLIENT.format(folder=at))
        Path("/run/sshd").mkdir(exist_ok=True)
        for number in (1, 2, 3):
            host = network.add(number)
            host.environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(at)}
            host.run(shutil.which("sshd") or "sshd", "-f", at / "server")
        yield list(network.hosts.values())
    finally:
        network.close()
        shutil.rmtree(at, ignore_errors=True)


def cluster(host: Host, *words: str) -> Any:
    """Run deploy/ssh/cluster on a host; returns its exit status and what it printed."""
    ran = host.start(
        ROOT / "deploy" / "ssh" / "cluster", *words[:1], "--ssh", f"ssh -F {host.network.folder}/client", *words[1:],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = ran.communicate(timeout=200)
    return SimpleNamespace(status=ran.returncode, out=out, err=err)


def running(host: Host) -> list[str]:
    """The processes of a host that are no part of its SSH server."""
    return [process.command for process in host.processes if not process.command.startswith("sshd:")]


def told(up: str, *settings: str) -> tuple[list[str], dict[str, str]]:
    """The command that `up` says to run, with settings, and the variables to set."""
    exported, command = up.strip().splitlines()[-2:]
    words = [word for word in shlex.split(command) if "..." not in word]
    return [*words, *settings], dict(word.split("=", 1) for word in shlex.split(exported)[1:])


@pytest.mark.cluster
def test_hosts_are_compared_started_used_and_stopped(hosts: list[Host], model: Any, tmp_path: Path) -> None:
    first, second, third = hosts
    installed = importlib.metadata.distribution("numba")
    metadata = Path(str(installed.locate_file(f"numba-{installed.version}.dist-info/METADATA")))
    other = tmp_path / "METADATA"
    other.write_text(metadata.read_text().replace(f"\nVersion: {installed.version}", "\nVersion: 0.1.2"))
    third.show(other, metadata)
    names = [host.name for host in hosts]

    refused = cluster(first, "up", *names)
    assert (refused.status, refused.out) == (1, "")
    assert refused.err == (
        f"host3: numba 0.1.2, not {installed.version}\ncluster: nothing was started: all hosts need what host1 has\n"
    )
    assert [running(host) for host in hosts] == [[], [], []]

    one_cpu = ("--", "--num-cpus=1")
    begun = cluster(first, "up", "host1", "host2", *one_cpu)
    assert begun.status == 0, begun.err
    stranger = second.start("sleep", "1000")
    third.run("umount", metadata)
    joined = cluster(first, "up", *names, *one_cpu)
    assert joined.status == 0, joined.err
    assert [line.split(", ")[0] for line in joined.out.splitlines()[:3]] == [
        "host1: was up", "host2: was up", "host3: is up",
    ]  # fmt: skip

    command, variables = told(joined.out, f"model.path={model.folder}", f"output.path={tmp_path / 'o' / 'out'}")
    token = Path(variables["RAY_AUTH_TOKEN_PATH"]).read_text()
    with (tmp_path / "said").open("w") as said:
        job = first.start(
            *command, *SETTINGS, "tracking=none", environment=variables, stdin=subprocess.DEVNULL,
            stdout=said, stderr=said,
        )  # fmt: skip
        workers, seen = set(), list[str]()
        while job.poll() is None:
            for path in (tmp_path / "o").glob(".out*/records/*.json"):
                with suppress(OSError):  # the job is done meanwhile, and has removed its journal
                    if (found := record_from(path.read_bytes())) is not None:
                        workers.add(found.node)
            seen = seen or [process.command for host in hosts for process in host.processes]
    assert job.returncode == 0, (tmp_path / "said").read_text()
    assert hashed(tmp_path / "o") == model.wanted
    assert hidden(tmp_path / "o") == []
    assert workers == {*names}
    assert any("raylet" in each for each in seen)
    assert not any(token in each for each in seen)

    ended = cluster(first, "down", *names)
    assert ended.status == 0, ended.err
    assert [running(host) for host in hosts] == [[], ["sleep 1000"], []]
    assert not (first.network.folder / ".weightmill-cluster").exists()
    stranger.kill()
    stranger.wait()


@pytest.mark.cluster
def test_hosts_that_do_not_answer_are_named(hosts: list[Host]) -> None:
    hosts[2].unplug()
    refused = cluster(hosts[0], "up", "host1", "host3")
    assert refused.status == 1
    assert refused.err.startswith("host3: ssh: connect to host host3 port 22: ")
    assert refused.err.endswith("\ncluster: nothing was started\n")
    assert running(hosts[0]) == []
