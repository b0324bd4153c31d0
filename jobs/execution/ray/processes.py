"""Ending processes of Ray that do not end by themselves: a frozen worker, and what a killed driver has left.

This file is also a program, the guard of a cluster that a job has started. It waits until its standard input ends,
which the driver holds open, and then kills what carries the cluster's mark in its environment and removes the cluster's
folder. So nothing outlives a driver that was killed without a chance to tidy up. It needs only Python's own library.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "WEIGHTMILL_RAY"  # the variable in the environment of processes of a cluster of ours; its value is the folder
WORKER = b"ray::"  # begins the title of a worker that runs a task
PROCESSES = Path("/proc")
ROUNDS, PAUSE_S = 100, 0.05  # a process in a call that never returns cannot be killed


def end_remotely(name: str) -> None:
    """Kill the worker of Ray on this machine that runs the task of a name, in a Ray task beside it.

    It may be stopped, so it is not asked; nor has it always told its process' id.
    """
    for each in PROCESSES.iterdir() if PROCESSES.is_dir() else ():
        # It has ended meanwhile, or is another user's.
        with suppress(OSError):
            if each.name.isdigit() and (each / "cmdline").read_bytes().rstrip(b"\0") == WORKER + name.encode():
                os.kill(int(each.name), signal.SIGKILL)


def guard(folder: Path, *, keep: bool) -> subprocess.Popen[bytes]:
    """Start the guard of a cluster whose files are in a folder, which it shall `keep` or remove.

    It goes to work when its standard input is closed.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(folder), *(["keep"] if keep else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the driver's terminal is not for it
    )


def kill_marked(folder: str) -> int:
    """Kill all processes with a cluster's mark; returns how many there were."""
    mark, found = f"{MARK}={folder}".encode(), 0
    for each in PROCESSES.iterdir() if PROCESSES.is_dir() else ():
        # It has ended meanwhile, or is another user's.
        with suppress(OSError):
            if each.name.isdigit() and mark in (each / "environ").read_bytes().split(b"\0"):
                os.kill(int(each.name), signal.SIGKILL)
                found += 1
    return found


def main(folder: str) -> None:
    sys.stdin.buffer.read()
    # A process that is about to start another may do so while the others are looked for.
    for _ in range(ROUNDS):
        if not kill_marked(folder):
            break
        time.sleep(PAUSE_S)
    if "keep" not in sys.argv[2:]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
