"""Runs a job again and again in forks of one process, so that its libraries are loaded once, and kills each run.

python -m tests.jobs.orchestration.killing changes|times COUNT FOLDER ARGUMENT...

`changes`: before one of the changes that a run makes to the disk (a file opened to be written, renamed, removed, ...),
spread over all of them. `times`: spread over the seconds that a run takes. The outputs are FOLDER/0, FOLDER/1, ... and
FOLDER/whole, which nobody kills.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jobs.run import main

CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "os.utime")
WRITES = os.O_WRONLY | os.O_RDWR
on_change: Callable[[], None] = lambda: None  # noqa: E731


def audited(event: str, given: tuple[Any, ...]) -> None:
    if event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITES):
        on_change()


def run(folder: str, name: str, arguments: list[str]) -> int:
    return main([*arguments, f"output.path={folder}/{name}"])


def killed(name: str, folder: str, arguments: list[str], before: int | None, after_s: float | None) -> None:
    """A fork that runs the job, until it is killed."""
    global on_change
    pid = os.fork()
    if pid == 0:
        seen = 0

        def count() -> None:
            nonlocal seen
            seen += 1
            if seen == before:
                os.kill(os.getpid(), signal.SIGKILL)

        on_change = count
        os._exit(run(folder, name, arguments))
    if after_s is not None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def kill_all(kind: str, count: int, folder: str, arguments: list[str]) -> None:
    global on_change
    assert run(folder, "first", arguments) == 0  # kernels are loaded now
    changes = 0

    def one_more() -> None:
        nonlocal changes
        changes += 1

    on_change, began = one_more, time.monotonic()
    assert run(folder, "whole", arguments) == 0
    on_change, took = lambda: None, time.monotonic() - began
    assert threading.active_count() == 1, "a fork would have only one of the threads"
    for number in range(count):
        share = (number + 0.5) / count
        killed(
            str(number), folder, arguments,
            before=round(share * changes) if kind == "changes" else None,
            after_s=share * took if kind == "times" else None,
        )  # fmt: skip


if __name__ == "__main__":
    sys.addaudithook(audited)
    kill_all(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
