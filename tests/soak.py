"""Jobs of every kind, one after another in one process: memory, files and threads stay as they are.

    python -m tests.soak [minutes=60] [jobs=0] [seed=0] [cluster=local|ray]

Each turn runs a job, verifies its output, lints it, loads it, now and then lets one fail, and removes the output; it
ends after so many minutes, or turns if `jobs` is given. With cluster=ray the jobs join a cluster that is started for
them, and its processes count, too. In the second half nothing is to grow any more; the status is 1 if something does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.kinds_of_jobs import KINDS

WARM = 3  # turns of each kind, after which libraries and kernels are loaded
MOST_GROWTH = 16 << 20  # bytes of resident memory in the second half; a leak of weights, 200 kB a turn, is more
FONTS = 64  # files that matplotlib keeps open: the fonts of the last threads that drew
SHOWN_S = 60.0


@dataclass(frozen=True)
class State:
    """What a process holds: resident bytes, open files, threads, and files in its temporary folder."""

    memory: int
    files: int
    threads: int
    left: int

    @staticmethod
    def now(temporary: Path, cluster: Cluster | None) -> State:
        gc.collect()
        memory = files = threads = 0
        for process in (psutil.Process(), *(cluster.processes() if cluster else ())):
            # A worker may end meanwhile.
            with contextlib.suppress(psutil.NoSuchProcess):
                memory += process.memory_info().rss
                files += process.num_fds()
                threads += process.num_threads()
        return State(memory, files, threads, sum(1 for _ in temporary.rglob("*")))

    def __str__(self) -> str:
        return f"{self.memory / 2**20:8.1f} MiB {self.files:6} files {self.threads:6} threads {self.left:6} temporary"


@dataclass(frozen=True)
class Cluster:
    """A cluster of Ray on this machine, which lives longer than its jobs."""

    address: str
    folder: Path

    def processes(self) -> Sequence[psutil.Process]:
        """Return those that stay between jobs, and workers that are there just now."""
        ours = [
            p for p in psutil.process_iter(["cmdline"]) if any(str(self.folder) in w for w in p.info["cmdline"] or ())
        ]
        return list({p.pid: p for each in ours for p in (each, *each.children(recursive=True))}.values())


@contextlib.contextmanager
def ray_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster of one node, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = Cluster(address, folder)
    settings = ("--node-ip-address=127.0.0.1", "--num-cpus=2", "--include-dashboard=false", f"--temp-dir={folder}")
    ray, port = Path(sys.executable).with_name("ray"), address.rpartition(":")[2]
    subprocess.run([ray, "start", "--head", f"--port={port}", *settings], check=True, capture_output=True)
    try:
        yield cluster
    finally:
        for process in cluster.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def turn(kind: str, source: Path, work: Path, cluster: Cluster | None, *, fails: bool) -> None:
    """Run a job of a kind and what follows it."""
    from loaders.loading.load import load_weights

    folder = work / "outputs"
    arguments = KINDS[kind].arguments(source, folder)
    tracking = f"tracking.uri=sqlite:///{work / 'mlflow.db'}"
    arguments = [tracking if word == "tracking=none" else word for word in arguments]
    if cluster is not None:
        arguments = [*(word for word in arguments if word != "cluster=local"), *_joined(cluster)]
    if fails:
        _verb(*arguments, "rules=[{name: '[', action: keep}]", status=2)
    _verb(*arguments)
    for out in [path.parent for path in folder.glob("*/weightmill.json")]:
        _verb("verify", f"output.path={out}", *(_joined(cluster) if cluster else ("cluster=local",)))
        _verb("lint", f"output.path={out}")
        load_weights(out, dtype="float32")
    shutil.rmtree(folder)


def _joined(cluster: Cluster) -> tuple[str, ...]:
    return "cluster=ray", f"cluster.address={cluster.address}"


def _verb(verb: str, *arguments: str, status: int = 0) -> None:
    """Run a verb, which has to end with this status."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        ended = importlib.import_module(f"jobs.{verb}").main(list(arguments))
    assert ended == status, (verb, *arguments, ended, said.getvalue())


def soak(
    minutes: float, jobs: int, seed: int, work: Path, cluster: Cluster | None = None
) -> tuple[int, Sequence[State]]:
    """Take so many turns, or for so many minutes; returns their number, and the states after each SHOWN_S."""
    temporary = work / "tmp"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    rng, turns = random.Random(seed), 0
    sources = {kind: KINDS[kind].source(work / kind) for kind in KINDS}
    for _ in range(WARM):
        for kind in KINDS:
            turn(kind, sources[kind], work, cluster, fails=True)
    states = [State.now(temporary, cluster)]
    print(f"{'turns':>6}  state\n{turns:6}  {states[0]}", flush=True)
    began = shown = time.monotonic()
    while turns < jobs if jobs else time.monotonic() - began < minutes * 60:
        kind = rng.choice(sorted(KINDS))
        turn(kind, sources[kind], work, cluster, fails=rng.random() < 0.1)
        turns += 1
        if time.monotonic() - shown >= SHOWN_S:
            shown = time.monotonic()
            states.append(State.now(temporary, cluster))
            print(f"{turns:6}  {states[-1]}", flush=True)
    states.append(State.now(temporary, cluster))
    print(f"{turns:6}  {states[-1]}", flush=True)
    return turns, states


def main(*arguments: str) -> int:
    usual = {"minutes": "60", "jobs": "0", "seed": "0", "cluster": "local"}
    given = {**usual, **dict(argument.partition("=")[::2] for argument in arguments)}
    if given.keys() - usual.keys() or given["cluster"] not in ("local", "ray"):
        print(__doc__, file=sys.stderr)
        return 2
    minutes, jobs, seed = float(given["minutes"]), int(given["jobs"]), int(given["seed"])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # Ray keeps logs of every worker that was: its folder lies apart from what is to stay empty.
        place = Path(folder)
        cluster = stack.enter_context(ray_cluster(place / "ray")) if given["cluster"] == "ray" else None
        _, states = soak(minutes, jobs, seed, place, cluster)
        first, last = states[len(states) // 2], states[-1]
    print("threads at the end: " + ", ".join(sorted(thread.name for thread in threading.enumerate())))
    grew = last.memory - first.memory > MOST_GROWTH
    more = last.files > states[0].files + FONTS or last.threads > first.threads or last.left > first.left
    print("it grows" if grew or more else "it does not grow")
    return int(grew or more)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
