"""Ray on several hosts, as people start it by hand, and the jobs that join it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from jobs.output.journal import record_from
from loaders.places import ROOT
from loaders.storage.hashes import digest
from tests.cluster.hosts import SERVER, Host, Network, Process
from tests.kinds_of_jobs import hidden, outputs

PORT = 6379
T = TypeVar("T")
# A host is called dead after three questions without an answer, 2 s apart: what docs/clusters.md advises.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "3000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
PATIENT = {"RAY_raylet_start_wait_time_s": "120"}  # when Ray starts, on a busy machine
# Where hosts look for S3, if a test has a server there.
BUCKETS = {
    "AWS_ENDPOINT_URL": f"http://{SERVER}:5000", "AWS_ACCESS_KEY_ID": "key-of-tests", "AWS_REGION": "us-east-1",
    "AWS_SECRET_ACCESS_KEY": "secret-of-tests", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
# What Ray, its C++ and Python itself say when something went wrong, and a person should never have to read.
FOREIGN = (
    "Traceback", "(raylet", "(pid=", ".cc:", ".py:", "*** SIG", "ray::", "StackTrace", "[2026-", "[2027-", "E0000",
    "core_worker", "Error: ", "ray.exceptions", "RayError", "ActorDied", "WorkerCrashed", "absl::", "terminate called",
    "Fatal Python",
)  # fmt: skip


def wait_for(what: Callable[[], T], for_s: float, why: str) -> T:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + for_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"waited {for_s:.0f} s: {why}"
        time.sleep(0.05)
    return found


class Cluster:
    """Ray on the hosts of a network: host1 is its head, and where jobs are started."""

    def __init__(
        self,
        folder: Path,
        hosts: int = 3,
        *,
        cpus: float | None = None,
        memory_mb: Mapping[int, int] | None = None,
        quotas: Mapping[int, float] | None = None,
        settings: Mapping[str, str] = HEALTH,
        head_works: bool = True,
    ) -> None:
        """`quotas` are CPUs of hosts by number, `cpus` of all others; `settings` are Ray's, of the environment."""
        self.network = Network(folder)
        self._environment = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **PATIENT, **BUCKETS,
            **settings,
        }  # fmt: skip
        try:
            for number in range(1, hosts + 1):
                self.network.add(
                    number, memory_mb=(memory_mb or {}).get(number), cpus=(quotas or {}).get(number, cpus)
                ).environment = dict(self._environment)
            self._head_cpus = int(head_works)
            self._start(self.hosts[0])
            self.join(*self.hosts[1:])
        except BaseException:
            self.close()
            raise

    @property
    def hosts(self) -> list[Host]:
        return list(self.network.hosts.values())

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{PORT}"

    def add(self, number: int, **limits: Any) -> Host:
        """Put up another host, which does not join yet."""
        host = self.network.add(number, **limits)
        host.environment = dict(self._environment)
        return host

    def _start(self, host: Host) -> None:
        host.run(*_ray(host, self._head_cpus), "--head", f"--port={PORT}", "--include-dashboard=false")

    def join(self, *hosts: Host, cpus: int = 1, environment: Mapping[str, str] | None = None) -> None:
        """Have hosts join, all at once."""
        starting = [
            host.start(
                *_ray(host, cpus), f"--address={self.address}", environment=environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for host in hosts
        ]  # fmt: skip
        for host, each in zip(hosts, starting, strict=True):
            said, _ = each.communicate(timeout=120)
            assert each.returncode == 0, f"{host.name}: {said}"

    def node(self, host: Host) -> str:
        """Return Ray's id of a host."""
        asks = (
            "import ray; ray.init('{}', logging_level=50); print('ids', *(n['NodeManagerAddress'] + '=' + n['NodeID']"
        )
        asks += " for n in ray.nodes() if n['Alive']))"
        said = self.hosts[0].run(sys.executable, "-c", asks.format(self.address))
        [line] = [line for line in said.splitlines() if line.startswith("ids ")]
        return dict(word.split("=") for word in line.split()[1:])[host.address]

    def remove(self, host: Host) -> None:
        """Take a host away that `add` has put up."""
        host.close()
        del self.network.hosts[host.number]

    def repair(self) -> None:
        """Make the cluster as it was: hosts to which something happened are switched off, on, and join again.

        If that is the head, all are.
        """
        off = [host for host in self.hosts if host.is_disturbed or not host.is_on or _lacks_ray(host)]
        off = self.hosts if self.hosts[0] in off else off
        for host in off:
            host.off()
        for host in off:
            host.boot()
        if self.hosts[0] in off:
            self._start(self.hosts[0])
        self.join(*(host for host in off if host is not self.hosts[0]))

    @property
    def workers(self) -> list[tuple[Host, Process]]:
        """The processes of Ray that run a task, with their hosts."""
        return [
            (host, process)
            for host in self.hosts
            if host.is_on
            for process in host.processes
            if re.match(r"ray::(?!IDLE|\w+Agent$)", process.command)
        ]

    def at_work(self, out: Path, host: Host | None = None) -> list[tuple[str, Host, Process]]:
        """The processes that are writing units of an output, with the unit's name."""
        found = []
        for where, process in self.workers:
            for path in process.opened if host in (None, where) else ():
                if f"/.{out.name}" in path and "/parts/" in path:
                    found.append((path.rsplit("/", 1)[1].partition(".")[0], where, process))
                    break
        return found

    def close(self) -> None:
        self.network.close()
        shutil.rmtree(self.network.folder, ignore_errors=True)


def _ray(host: Host, cpus: int) -> list[str]:
    return [
        "ray", "start", f"--node-ip-address={host.address}", f"--num-cpus={cpus}", "--disable-usage-stats",
        "--object-store-memory=100000000",
    ]  # fmt: skip


def _lacks_ray(host: Host) -> bool:
    return not any("raylet/raylet" in process.command for process in host.processes)


def hashed(folder: Path) -> dict[str, Any]:
    """Return what is visible of outputs in a folder, files by their hashes, and their reports without times."""
    return {
        name: ({file: digest(data) for file, data in files.items()}, report)
        for name, (files, report) in outputs(folder).items()
    }


@dataclass(frozen=True)
class Ended:
    """How a job ended: exit status, what it printed, how long it took and was without a finished unit."""

    status: int
    said: str
    seconds: float
    stall_s: float
    left: tuple[str, ...]  # in the output's folder, beside the output
    hosts: Mapping[str, int]  # units by host
    outputs: Mapping[str, Any] = field(repr=False)

    @property
    def foreign(self) -> list[str]:
        """The lines that it printed and that are not ours."""
        return [line for line in self.said.splitlines() if any(each in line for each in FOREIGN)]


class Job:
    """A job on a host, whose records are watched. It joins the cluster unless its settings say otherwise."""

    def __init__(
        self, cluster: Cluster, source: Path, out: Path, *settings: str, host: Host | None = None,
        to: str | None = None, environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """`to` is the address of an output that does not lie in the folder `out`."""
        self.cluster, self.out = cluster, out
        self._to = f"output.path={to or out}"
        self._folder = cluster.network.seen(out.parent)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.host = host or cluster.hosts[0]
        self.units: dict[str, tuple[float, str]] = {}  # when a unit was found finished, and by which host
        self._said = self.host.folder / f"said-{secrets.token_hex(4)}"
        self._began = time.monotonic()
        joins = ("cluster=ray", f"cluster.address={cluster.address}", "cluster.ship_code=false")
        with self._said.open("w") as said:
            self._driver = self.host.start(
                sys.executable, "-m", "jobs.run", f"model.path={source}", self._to, *settings,
                *(() if "cluster=ray" in settings else joins),
                *(() if any(each.startswith("tracking") for each in settings) else ("tracking=none",)),
                environment=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            for path in self._folder.glob(f".{self.out.name}*/records/*.json"):
                if path.stem not in self.units:
                    with suppress(OSError):
                        if (found := record_from(path.read_bytes())) is not None:
                            self.units[path.stem] = time.monotonic(), found.node

    @property
    def is_running(self) -> bool:
        return self._driver.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send the driver a signal, as a terminal or a scheduler does."""
        self.driver.kill(number)

    @property
    def driver(self) -> Process:
        [found] = [each for each in self.host.processes if each.command.startswith(f"{sys.executable} -m jobs.run")
                   and self._to in each.command]  # fmt: skip
        return found

    def wait_for_units(self, number: int, by: Host | None = None) -> None:
        """Wait until a number of units are finished, in all or by one host."""

        def enough() -> bool:
            assert self.is_running, f"it ended before: {self.said}"
            return sum(by is None or node == by.name for _, node in list(self.units.values())) >= number

        wait_for(enough, 180, f"for {number} units: {self.said}")

    @property
    def said(self) -> str:
        return self._said.read_text()

    def end(self, for_s: float = 300) -> Ended:
        """Wait for the job's end, at most for a time, after which it is killed: status 124, as of `timeout`."""
        try:
            status = self._driver.wait(for_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self._driver.wait()
            status = 124
        ended = time.monotonic()
        self._stop.set()
        times = sorted([self._began, *(when for when, _ in self.units.values()), ended])
        nodes = [node for _, node in self.units.values()]
        return Ended(
            status=status, said=self.said, seconds=ended - self._began,
            stall_s=max(later - earlier for earlier, later in pairwise(times)),
            left=tuple(path.name for path in hidden(self._folder)),
            hosts={node: nodes.count(node) for node in sorted(set(nodes))}, outputs=hashed(self._folder),
        )  # fmt: skip
