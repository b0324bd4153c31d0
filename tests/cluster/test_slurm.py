"""deploy/slurm on a real Slurm, Debian's slurm-wlm, whose nodes are hosts of a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jobs.output.journal import record_from
from loaders.places import ROOT
from tests.cluster.cluster import hashed, wait_for
from tests.cluster.hosts import NET, Host, Network
from tests.cluster.model import SETTINGS
from tests.kinds_of_jobs import hidden

SCRIPT = ROOT / "deploy" / "slurm" / "job.sbatch"
COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "munged")
# Requeued jobs wait until their credentials have expired.
CONF = """
ClusterName=tests
SlurmctldHost=host1({net}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool-%n
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd-%n.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=20
SlurmdTimeout=30
NodeName=host[1-2] CPUs=1 RealMemory=2000 State=UNKNOWN
PartitionName=tests Nodes=host[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A controller on host1, and two nodes."""

    def __init__(self, network: Network) -> None:
        self.network, at = network, network.folder
        self._at = at
        (at / "state").mkdir()
        (at / "slurm.conf").write_text(CONF.format(net=NET, at=at))
        (at / "cgroup.conf").write_text("")
        (at / "munge.key").write_bytes(os.urandom(128))
        (at / "munge.key").chmod(0o400)
        self._munge = subprocess.Popen(
            ["munged", "--foreground", "--force", f"--key-file={at}/munge.key", f"--socket={at}/munge.socket",
             f"--pid-file={at}/munge.pid", f"--log-file={at}/munge.log", f"--seed-file={at}/munge.seed"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for((at / "munge.socket").exists, 20, "munged")
        for number in (1, 2):
            network.add(number).environment = {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_CONF": str(at / "slurm.conf"),
                "SLURM_TMPDIR": "/tmp/ray", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
        self.head.run("slurmctld", "-c")
        for number, host in network.hosts.items():
            (at / f"spool-host{number}").mkdir()
            host.run("slurmd", "-N", host.name)
        self.wait_until_idle()

    @property
    def head(self) -> Host:
        return self.network.hosts[1]

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.head.run("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], 60, "nodes to be idle")

    @property
    def left(self) -> list[str]:
        """What jobs have left on the nodes: processes, folders."""
        hosts = self.network.hosts.values()
        found = [process.command for host in hosts for process in host.processes if "slurm" not in process.command]
        return [*found, *(path.name for host in hosts for path in (host.folder / "ray").iterdir())]

    def about(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.head.run("scontrol", "show", "job", "--oneliner", job)))

    def close(self) -> None:
        self.network.close()
        self._munge.terminate()
        self._munge.wait()
        shutil.rmtree(self._at, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm(folder: Path) -> Iterator[Slurm]:
    if lacks := [each for each in COMMANDS if shutil.which(each) is None]:
        pytest.skip(f"{', '.join(lacks)}, of Debian's slurm-wlm and munge, are not installed")
    network = Network(folder / "slurm")
    made = Slurm(network)
    yield made
    made.close()


class Submitted:
    """A job of Slurm that quantizes the model."""

    def __init__(self, slurm: Slurm, folder: Path, *words: str | Path, settings: Sequence[str] = ()) -> None:
        self.slurm, self.out, self._log = slurm, folder / "o" / "out", folder / "log"
        self.workers = set[str]()
        given = [*(words or (SCRIPT,)), *settings]
        self.id = slurm.head.run("sbatch", "--parsable", f"--output={self._log}", *given).strip()

    @property
    def said(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def state(self) -> str:
        return self.slurm.about(self.id)["JobState"]

    def units(self) -> int:
        """Return how many units are recorded, and note who has done them."""
        found = list(self.out.parent.glob(".out*/records/*.json"))
        for path in found:
            with suppress(OSError):  # the job is done meanwhile, and has removed its journal
                if (record := record_from(path.read_bytes())) is not None:
                    self.workers.add(record.node)
        return len(found)

    def wait_for_units(self, number: int) -> None:
        wait_for(lambda: self.units() >= number or self.state in OVER, 120, f"units: {self.said}")
        assert self.state == "RUNNING", self.said

    def end(self) -> dict[str, str]:
        """Wait for the job's end, and return what Slurm knows of it; nothing is left on the nodes."""
        wait_for(lambda: (self.units(), self.state in OVER)[1], 150, f"the end: {self.said}")
        self.slurm.wait_until_idle()
        wait_for(lambda: self.slurm.left == [], 10, "the nodes to be as before")  # workers see soon that Ray is gone
        return self.slurm.about(self.id)


OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture
def settings(model: Any, tmp_path: Path) -> tuple[str, ...]:
    return f"model.path={model.folder}", f"output.path={tmp_path / 'o' / 'out'}", *SETTINGS, "tracking=none"


def is_done(job: Submitted, wanted: Any) -> None:
    assert job.end()["JobState"] == "COMPLETED", job.said
    assert hashed(job.out.parent) == wanted
    assert hidden(job.out.parent) == []


@pytest.mark.cluster
def test_a_job_whose_time_is_up_is_queued_again_and_goes_on(
    slurm: Slurm, model: Any, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    job = Submitted(slurm, tmp_path, settings=settings)
    job.wait_for_units(2)
    slurm.head.run("scancel", "--batch", "--signal=USR1", job.id)  # as --signal has Slurm do before the time limit
    wait_for(lambda: job.state in ("PENDING", *OVER), 60, job.said)
    assert hidden(job.out.parent) != []
    is_done(job, model.wanted)
    assert slurm.about(job.id)["Restarts"] == "1"
    assert "job.sbatch: the time is up: queued again" in job.said
    assert re.search(r"[1-9]\d* of \d+ units were done before; going on with the rest", job.said)
    assert job.workers == {"host1", "host2"}


@pytest.mark.cluster
def test_a_cancelled_job_goes_on_when_it_is_submitted_again(
    slurm: Slurm, model: Any, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    job = Submitted(slurm, tmp_path, settings=settings)
    job.wait_for_units(2)
    slurm.head.run("scancel", job.id)
    assert job.end()["JobState"] == "CANCELLED"
    assert "units are done and kept" in job.said
    # As an element of an array, whose settings are a line of a file.
    (tmp_path / "jobs.txt").write_text(f"model.path=nowhere\n'{settings[0]}' {' '.join(settings[1:])}\n")
    again = Submitted(slurm, tmp_path, "--nodes=1", "--array=2", SCRIPT, f"@{tmp_path / 'jobs.txt'}")
    is_done(again, model.wanted)
    assert "units were done before" in again.said


@pytest.mark.cluster
def test_settings_that_are_refused_fail_the_job(slurm: Slurm, tmp_path: Path) -> None:
    job = Submitted(slurm, tmp_path, "--nodes=1", SCRIPT, settings=["model.path=/nowhere", "tracking=none"])
    about = job.end()
    assert (about["JobState"], about["ExitCode"]) == ("FAILED", "2:0"), job.said
    assert "expected a folder of weights at /nowhere" in job.said


@pytest.mark.cluster
def test_a_node_that_dies_ends_neither_job_nor_allocation(
    slurm: Slurm, model: Any, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    job = Submitted(slurm, tmp_path, settings=settings)
    job.wait_for_units(2)
    slurm.network.hosts[2].off()  # for good: this is the last test
    wait_for(lambda: (job.units(), job.state in OVER)[1], 150, f"the end: {job.said}")
    assert job.state == "COMPLETED", job.said
    assert hashed(job.out.parent) == model.wanted
    assert hidden(job.out.parent) == []
