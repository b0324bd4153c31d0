"""Jobs of every kind, one after another in one process: memory, files and threads stay as they are.

    python -m tests.soak [minutes=60] [seed=0]

Each turn runs a job, verifies its output, lints it, loads it, now and then lets one fail, and removes the output. In
the second half of the time the process is to grow no more; the status is 1 if it does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    def now(temporary: Path) -> State:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(list(Path("/proc/self/fd").iterdir()))
        left = sum(1 for _ in temporary.rglob("*"))
        return State(pages * os.sysconf("SC_PAGE_SIZE"), files, len(list(Path("/proc/self/task").iterdir())), left)

    def __str__(self) -> str:
        return f"{self.memory / 2**20:8.1f} MiB {self.files:6} files {self.threads:6} threads {self.left:6} temporary"


def turn(kind: str, source: Path, work: Path, *, fails: bool) -> None:
    """Run a job of a kind and what follows it."""
    from loaders.loading.load import load_weights

    folder = work / "outputs"
    arguments = KINDS[kind].arguments(source, folder)
    tracking = f"tracking.uri=sqlite:///{work / 'mlflow.db'}"
    arguments = [tracking if word == "tracking=none" else word for word in arguments]
    if fails:
        _verb(*arguments, "rules=[{name: '[', action: keep}]", status=2)
    _verb(*arguments)
    for out in [path.parent for path in folder.glob("*/weightmill.json")]:
        _verb("verify", f"output.path={out}", "cluster=local")
        _verb("lint", f"output.path={out}")
        load_weights(out, dtype="float32")
    shutil.rmtree(folder)


def _verb(verb: str, *arguments: str, status: int = 0) -> None:
    """Run a verb, which has to end with this status."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        ended = importlib.import_module(f"jobs.{verb}").main(list(arguments))
    assert ended == status, (verb, *arguments, ended, said.getvalue())


def soak(minutes: float, seed: int, work: Path) -> tuple[int, Sequence[State]]:
    """Take turns for so many minutes; returns their number, and the states after each SHOWN_S."""
    temporary = work / "tmp"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    rng, turns = random.Random(seed), 0
    sources = {kind: KINDS[kind].source(work / kind) for kind in KINDS}
    for _ in range(WARM):
        for kind in KINDS:
            turn(kind, sources[kind], work, fails=True)
    states = [State.now(temporary)]
    print(f"{'turns':>6}  state\n{turns:6}  {states[0]}", flush=True)
    began = shown = time.monotonic()
    while time.monotonic() - began < minutes * 60:
        kind = rng.choice(sorted(KINDS))
        turn(kind, sources[kind], work, fails=rng.random() < 0.1)
        turns += 1
        if time.monotonic() - shown >= SHOWN_S:
            shown = time.monotonic()
            states.append(State.now(temporary))
            print(f"{turns:6}  {states[-1]}", flush=True)
    states.append(State.now(temporary))
    print(f"{turns:6}  {states[-1]}", flush=True)
    return turns, states


def main(*arguments: str) -> int:
    given = {"minutes": "60", "seed": "0", **dict(argument.partition("=")[::2] for argument in arguments)}
    if given.keys() - {"minutes", "seed"}:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        _, states = soak(float(given["minutes"]), int(given["seed"]), Path(folder))
        first, last = states[len(states) // 2], states[-1]
    print("threads at the end: " + ", ".join(sorted(thread.name for thread in threading.enumerate())))
    grew = last.memory - first.memory > MOST_GROWTH
    more = last.files > states[0].files + FONTS or last.threads > first.threads or last.left > first.left
    print("it grows" if grew or more else "it does not grow")
    return int(grew or more)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
