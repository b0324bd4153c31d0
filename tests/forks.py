"""Commands of weightmill in forks of one process, so that libraries are loaded once, and what is done to them there.

python -m tests.forks WARM: the process itself. It runs the commands of WARM, a list in JSON; then each line of standard
input describes a command that runs in a fork.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.processes import start

# What Python tells audit hooks of changes to the disk.
CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "os.utime")
WRITES = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Fault:
    """What happens to a command.

    It is killed before the change to the disk of the number `kill_at`, or `after_s` later, wherever it is then. And the
    system call `call` fails once, when it is called as the number `call_at`, with `error`, an errno.
    """

    kill_at: int = 0
    after_s: float = 0.0
    call: str = ""
    call_at: int = 0
    error: int = 0


NONE = Fault()


@dataclass(frozen=True)
class Ran:
    """How a command ended: its exit status or minus the signal, what it printed, and what it did if it ended itself.

    `changes` are its changes to the disk, `calls` its system calls of the fault's kind.
    """

    status: int
    out: str
    err: str
    changes: int
    calls: int

    @property
    def was_killed(self) -> bool:
        return self.status in (-signal.SIGKILL, -signal.SIGALRM)

    @property
    def complaint(self) -> str:
        """What is wrong with how it ended: a traceback, a status that is not documented, an error that says nothing."""
        if "Traceback" in self.err:
            return f"a traceback: {self.err.strip()[-300:]}"
        if self.status not in (0, 1, 2):
            return f"status {self.status}"
        says = self.status == 0 or "weightmill: " in self.err or self.out.strip()
        return "" if says else f"status {self.status} without a word"


class Forks:
    """The process that forks."""

    def __init__(
        self, folder: Path, warm: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = folder / "log"
        self._process = start("-m", "tests.forks", json.dumps(warm), environment=environment, stdin=-1, stderr=None)
        assert self._answer() == "ready"

    def run(self, *arguments: str | Path, fault: Fault = NONE) -> Ran:
        """Run a command to its end."""
        asked = {"arguments": [str(each) for each in arguments], "log": str(self._log), "fault": asdict(fault)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        status = int(self._answer())
        out, err = (Path(f"{self._log}.{end}").read_text(errors="replace") for end in ("out", "err"))
        changes, calls = json.loads(Path(f"{self._log}.did").read_text() or "[0, 0]")
        return Ran(status, out, err, changes, calls)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"it ended with status {self._process.wait()}"
        return line

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# --- in the process


class _Watch:
    """Counts the changes of a fork, and kills it when it is time."""

    fault: Fault | None = None
    changes = 0

    def audited(self, event: str, given: tuple[Any, ...]) -> None:
        if self.fault is None:
            return
        if event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITES):
            self.changes += 1
            if self.changes == self.fault.kill_at:
                self._kill(self.fault.after_s)

    def _kill(self, after_s: float) -> None:
        if after_s:
            # An alarm that nobody handles ends a process as hard as SIGKILL does, whatever its threads do.
            signal.setitimer(signal.ITIMER_REAL, after_s)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def _calls() -> Any:
    """The library that tests/failing_calls.c becomes, if this process was started with it; else None."""
    return ctypes.CDLL(None) if "failing_calls" in os.environ.get("LD_PRELOAD", "") else None


def _run(main: Any, watch: _Watch, asked: Mapping[str, Any]) -> None:
    """Run a command in this process, which is a fork, and end it."""
    log, fault = asked["log"], Fault(**asked["fault"])
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    did = os.open(f"{log}.did", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    library = _calls()
    watch.fault = fault
    if library is not None:
        library.fail_call(fault.call.encode(), ctypes.c_long(fault.call_at), fault.error)
    try:
        status = main(asked["arguments"])
    except BaseException:
        import traceback

        status = 70
        traceback.print_exc()
    calls = 0 if library is None else library.calls_made()
    watch.fault = None
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(did, json.dumps([watch.changes, calls]).encode())
    os._exit(status)


def serve(warm: Sequence[Sequence[str]]) -> None:
    """Run the commands of `warm`, then those of standard input, in forks; prints the status of each."""
    from jobs.cli.main import main

    watch = _Watch()
    sys.addaudithook(watch.audited)
    answers = os.fdopen(os.dup(1), "w")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    for arguments in warm:
        assert main(arguments) == 0, arguments
    assert threading.active_count() == 1, "a fork would have only one of the threads"
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(main, watch, json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
