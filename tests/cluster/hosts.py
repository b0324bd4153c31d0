"""Several hosts on one Linux machine, each as namespaces of its own, whose power and cables tests pull.

A host has its own address, name, processes, mounts, /dev/shm and /tmp/ray; the file system is the machine's, as if all
hosts had it mounted, and a test changes what one of them sees of it. A host's memory and CPU are limited by cgroups of
version 1, where there are any. Hosts hang on a bridge in another network namespace, from which no route leads out.
Whatever becomes of the tests' process, all ends with it. Needs root, iproute2, util-linux and GNU coreutils.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
PERIOD_US = 20_000  # of the CPU's quota: short, so that half a CPU is half a CPU also for a tenth of a second
NET = "10.77.0"
SERVER = f"{NET}.254"  # the address of the bridge, where tests run servers
# The process 1 of a host, which reaps what its parents have left.
INIT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mkdir -p /tmp/ray
mount --bind "$HOST_FOLDER/ray" /tmp/ray
mount --bind "$HOST_FOLDER/../hosts" /etc/hosts
hostname "$HOST_NAME"
for made in $HOST_CGROUPS; do
    echo 1 > "$made/cgroup.procs"
    mount --bind "$made" "$(dirname "$made")"
done
ip link set lo up
touch "$HOST_FOLDER/is-up"
while :; do sleep 86400 & wait $! || true; done
"""
WAITS = "sleep 86400"  # with which it waits
# What all hosts have mounted: the machine's file system and a disk, which is small.
SHARED = """
mount --make-rprivate /
mkdir -p "$DISK"
mount -t tmpfs -o size=1m tmpfs "$DISK"
ip link set lo up
touch "$DISK/is-there"
exec sleep infinity
"""
# Variables of the tests' own process: with a TMPDIR, Ray of all hosts would share a folder.
OF_THE_MACHINE = ("--unset=RAY_ADDRESS", "--unset=TMPDIR", "--unset=RAY_TMPDIR")
# Nothing of a host outlives the process that runs the tests.
DIES = ["setpriv", "--pdeathsig", "KILL"]


@cache
def missing() -> str | None:
    """Return what this machine lacks to be several hosts; None if it lacks nothing."""
    if sys.platform != "linux":
        return "namespaces, which only Linux has"
    if os.geteuid() != 0:
        return "root"
    tools = [tool for tool in ("ip", "nsenter", "unshare", "setpriv", "mount") if shutil.which(tool) is None]
    if tools:
        return f"the commands {', '.join(tools)} (iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"namespaces with a bridge ({tried.stderr.strip()})" if tried.returncode else None


def can_limit(what: str) -> bool:
    """Whether a host's "memory" or "cpu" can be limited: by a cgroup of version 1."""
    file = {"memory": "memory.limit_in_bytes", "cpu": "cpu.cfs_quota_us"}[what]
    return os.access(CGROUPS / what / "cgroup.procs", os.W_OK) and any((CGROUPS / what).glob(f"**/{file}"))


@dataclass(frozen=True)
class Process:
    """A process of a host: its number here, and its command line."""

    number: int
    command: str

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.number, signal_number)

    @property
    def opened(self) -> list[str]:
        """The paths of the files that it has open."""
        found = []
        with suppress(OSError):
            for each in Path(f"/proc/{self.number}/fd").iterdir():
                with suppress(OSError):
                    found.append(str(each.readlink()))
        return found


class Host:
    """A host on a network; it is up once it is made."""

    def __init__(
        self, network: Network, number: int, *, memory_mb: int | None = None, cpus: float | None = None
    ) -> None:
        self.network, self.number = network, number
        self.name, self.address = f"host{number}", f"{NET}.{number}"
        self.folder = network.folder / self.name
        self.environment: dict[str, str] = {}  # of what is started here
        self._cgroups = self._limits(memory_mb)
        self.limit(cpus)
        self._cable = f"cable{number}"
        self.is_disturbed = False  # by something that does not pass by itself
        self.boot()

    def boot(self) -> None:
        """Switch the host on, as after a repair: with an empty /tmp/ray and everybody's view of the file system."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "ray").mkdir(parents=True)
        given = {
            "HOST_FOLDER": str(self.folder), "HOST_NAME": self.name, "HOST_CGROUPS": " ".join(map(str, self._cgroups))
        }  # fmt: skip
        spaces = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        with (self.folder / "init.log").open("w") as log:
            self._holder = subprocess.Popen(
                [*DIES, *self.network.mounts, *spaces, "bash", "-c", INIT], env={**os.environ, **given},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._wait_until_up()
        self._init = int(_children(self._holder.pid)[0])
        self._space = Path(f"/proc/{self._init}/ns/pid").readlink()
        switch = self.network.switch
        switch("ip", "link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", str(self._init))
        switch("ip", "link", "set", self._cable, "master", "br0", "up")
        self._net("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self._net("ip", "link", "set", "eth0", "up")
        self.is_disturbed = False

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / "is-up").exists():
            said = (self.folder / "init.log").read_text()
            assert self._holder.poll() is None, f"{self.name} does not start: {said}"
            assert time.monotonic() < deadline, f"{self.name} does not start: {said}"
            time.sleep(0.02)

    def _limits(self, memory_mb: int | None) -> list[Path]:
        made = [CGROUPS / kind / f"{self.network.id}-{self.name}" for kind in ("cpu", "memory") if can_limit(kind)]
        for each in made:
            each.mkdir(exist_ok=True)
        if memory_mb is not None:
            (made[-1] / "memory.limit_in_bytes").write_text(str(memory_mb << 20))
        return made

    def limit(self, cpus: float | None) -> None:
        """Give the host a share of the CPUs, or all of them; where `can_limit("cpu")`."""
        for each in self._cgroups:
            if each.parent.name == "cpu":
                (each / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (each / "cpu.cfs_quota_us").write_text(str(-1 if cpus is None else int(PERIOD_US * cpus)))

    @property
    def is_on(self) -> bool:
        return self._holder.poll() is None

    # --- what runs there

    def command(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> list[str]:
        """Return the command that runs one in this host, in the current folder, as in a terminal: signals stop it."""
        given = {**self.environment, **(environment or {})}
        enter = f"nsenter --target {self._init} --net --mount --uts --ipc --pid -- env"
        joins = "".join(f"echo $$ > {made}/cgroup.procs; " for made in self._cgroups)
        words = [f"--chdir={Path.cwd()}", "--default-signal=INT,TERM,HUP", *OF_THE_MACHINE]
        words += [f"{name}={value}" for name, value in given.items()]
        return [*DIES, "sh", "-c", f'{joins}exec {enter} "$@"', "sh", *words, *map(str, arguments)]

    def start(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command in this host; `options` are those of Popen."""
        return subprocess.Popen(self.command(*arguments, environment=environment), text=True, **options)

    def run(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> str:
        """Run a command in this host and return what it printed; it must succeed."""
        ran = self.start(
            *arguments, environment=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        said, _ = ran.communicate(timeout=120)
        assert ran.returncode == 0, f"{self.name}: {' '.join(map(str, arguments))}: {said}"
        return said

    @property
    def processes(self) -> list[Process]:
        """Everything that runs there, but process 1 and what it waits with."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == self._init:
                continue
            with suppress(OSError):
                if (folder / "ns/pid").readlink() == self._space and _command(folder) != WAITS:
                    found.append(Process(int(folder.name), _command(folder)))
        return found

    # --- what happens to it

    def off(self) -> None:
        """Pull the power: nobody is told, as no packet leaves a host without power."""
        if not self.is_on:
            return
        self.is_disturbed = True
        self.network.switch("ip", "link", "delete", self._cable)
        self._end()

    def freeze(self) -> None:
        """Stop all processes of the host; its network answers."""
        self.is_disturbed = True
        for process in self.processes:
            process.kill(signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self.processes:
            process.kill(signal.SIGCONT)
        self.is_disturbed = False

    def unplug(self) -> None:
        """Pull the cable."""
        self.is_disturbed = True
        self.network.switch("ip", "link", "set", self._cable, "down")

    def plug(self) -> None:
        self.network.switch("ip", "link", "set", self._cable, "up")
        self.is_disturbed = False

    def hide(self, folder: Path) -> None:
        """Let the host see an empty folder in the place of one."""
        self._mount("-t", "tmpfs", "tmpfs", folder)

    def show(self, other: Path, at: Path) -> None:
        """Let the host see another file or folder at a path."""
        self._mount("--bind", other, at)

    def make_read_only(self, folder: Path) -> None:
        self._mount("--bind", folder, folder)
        self._mount("-o", "remount,bind,ro", folder)

    def _mount(self, *arguments: str | Path) -> None:
        self.is_disturbed = True
        self.run("mount", *arguments)

    def _net(self, *arguments: str) -> None:
        _run("nsenter", "--target", str(self._init), "--net", *arguments)

    def _end(self) -> None:
        self._holder.kill()
        self._holder.wait()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{self._init}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self) -> None:
        self._end()
        for made in self._cgroups:
            deadline = time.monotonic() + 5
            while made.exists() and time.monotonic() < deadline:
                with suppress(OSError):
                    made.rmdir()
                time.sleep(0.02)


class Network:
    """A bridge, to which hosts are connected by cables. `folder` holds what belongs to the hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hosts = folder, dict[int, Host]()
        self.id = f"weightmill-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{NET}.{number} host{number}\n" for number in range(1, 20))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        self.disk = folder / "disk"
        self._holder = subprocess.Popen(
            [*DIES, "unshare", "--net", "--mount", "bash", "-c", SHARED], env={**os.environ, "DISK": str(self.disk)},
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while not (self.seen(self.disk) / "is-there").exists():
            assert self._holder.poll() is None, "no network namespace"
            assert time.monotonic() < deadline, "no network namespace"
            time.sleep(0.01)
        self.switch("ip", "link", "add", "br0", "type", "bridge")
        self.switch("ip", "link", "set", "br0", "up")
        self.switch("ip", "address", "add", f"{SERVER}/24", "dev", "br0")

    @property
    def mounts(self) -> list[str]:
        """The beginning of a command that is run in the mounts that hosts have when they boot."""
        return ["nsenter", "--target", str(self._holder.pid), "--mount"]

    def seen(self, path: Path) -> Path:
        """Return where the tests' own process finds a path of the hosts, also on the disk."""
        return Path(f"/proc/{self._holder.pid}/root{path}")

    def resize_disk(self, mb: int) -> None:
        _run(*self.mounts, "mount", "-o", f"remount,size={mb}m", str(self.disk))

    def add(self, number: int, *, memory_mb: int | None = None, cpus: float | None = None) -> Host:
        self.hosts[number] = Host(self, number, memory_mb=memory_mb, cpus=cpus)
        return self.hosts[number]

    def switch(self, *arguments: str) -> None:
        """Run a command where the bridge is."""
        _run(*self.at_switch(*arguments))

    def at_switch(self, *arguments: str | Path) -> list[str]:
        """Return the command that runs one where the bridge is, at SERVER: all hosts reach what listens there."""
        return [*DIES, "nsenter", "--target", str(self._holder.pid), "--net", *map(str, arguments)]

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()
        self._holder.kill()
        self._holder.wait()


def _run(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{shlex.join(command)}: {ran.stderr}"


def _children(number: int) -> Sequence[str]:
    return Path(f"/proc/{number}/task/{number}/children").read_text().split()


def _command(folder: Path) -> str:
    return (folder / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
