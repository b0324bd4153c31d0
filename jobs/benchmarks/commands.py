"""Commands that a benchmark times: what each took of time, CPU and memory, and what it said."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from loaders.errors import StorageError
from loaders.places import ROOT

BLOCK = 512  # bytes of the blocks in which getrusage(2) counts reads


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A finished command, its children that it waited for included in all but `seconds` and `peak_bytes`."""

    seconds: float
    user_s: float
    system_s: float
    minor_faults: int
    waits: int  # times that a thread gave its CPU up by itself
    preemptions: int  # times that it was taken away
    fetched_bytes: int  # that the kernel read from disks for it
    peak_bytes: int  # resident memory; 0 if it is not known, since this process had more before: a child inherits that
    said: str  # its standard output

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


def run_command(
    command: Sequence[str], environment: Mapping[str, str] | None = None, started: Callable[[int], None] | None = None
) -> Ran:
    """Run a command to its end; `started` is told its process id, and `environment` adds to this process's.

    Raises:
        StorageError: its exit status is not 0; the message has the last line of its standard error.
    """
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        began = perf_counter()
        process = subprocess.Popen(
            command, stdout=said, stderr=complained, stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            if started is not None:
                started(process.pid)
            # wait4 gives this process's own resource usage; getrusage would mix it with that of earlier commands.
            _, status, usage = os.wait4(process.pid, 0)
        # Interrupts too: the command must not go on without its benchmark.
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = usage.ru_maxrss if usage.ru_maxrss > inherited else 0
        said.seek(0)
        complained.seek(0)
        if process.returncode:
            lines = complained.read().strip().splitlines() or said.read().strip().splitlines() or ["no message"]
            raise StorageError(f"exit status {process.returncode}: {lines[-1]}")
        return Ran(
            seconds=seconds, user_s=usage.ru_utime, system_s=usage.ru_stime, minor_faults=usage.ru_minflt,
            waits=usage.ru_nvcsw, fetched_bytes=usage.ru_inblock * BLOCK, preemptions=usage.ru_nivcsw,
            peak_bytes=peak * (1 if sys.platform == "darwin" else 1024), said=said.read(),
        )  # fmt: skip


def job_command(
    source: Path | str,
    quants: Sequence[str],
    into: str,
    *settings: str,
    tracking: str = "tracking=none",
    verb: str = "run",
    cluster: str = "cluster=local",
) -> list[str]:
    """Return the command of a job, a sweep or a plan over a source; `into` is its output.path= or output.root=."""
    given = (f"model.path={source}", f"quant={','.join(quants)}", into, tracking, cluster, "format=json")
    return [sys.executable, "-m", f"jobs.{verb}", *(["-m"] if len(quants) > 1 else []), *given, *settings]


def ours() -> dict[str, str]:
    """Return the environment in which a command finds this package's modules, wherever it is started.

    Python may keep what it compiles, as it does unless PYTHONDONTWRITEBYTECODE is set: compiling a library's modules
    at every start would be timed as ours.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": ""}


@contextmanager
def on_cores(cores: list[int]) -> Iterator[None]:
    """Set the cores on which processes run that this thread starts inside the block; they inherit its affinity."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
