"""What counts as right: a reading that succeeds or refuses by an error of ours, within its time and memory."""

from __future__ import annotations

import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loaders.errors import WeightmillError
from loaders.places import ROOT
from tests.fuzz.cases import Bench, Case, Reader

MOST_S = 2.0  # of processor time, which other work on the machine does not lengthen
PATIENT_S = 30.0  # for what is late once: libraries that are imported, kernels that are compiled
MOST_BYTES = 1 << 30  # of addresses, beyond what the process had before


class Found(Exception):
    """A reading went wrong. The cause, if it was an exception, is chained; `kind` is exception, hang or allocation."""

    def __init__(self, kind: str, what: str, trace: str = "") -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.trace = trace


class _Late(BaseException):
    """The time is over. Not an Exception, which readers may catch."""


def _place_of(error: BaseException) -> str:
    """The type of an error, and the last place of ours on its way: what tells one fault from another."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT)]
    inside = [f for f in ours if not Path(f.filename).is_relative_to(ROOT / "tests")] or ours
    if not inside:
        return type(error).__name__
    last = inside[-1]
    return f"{type(error).__name__} in {Path(last.filename).relative_to(ROOT)}: {last.name}"


def limit_memory() -> None:
    """Let this process take no more than MOST_BYTES beyond what it has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def lift_memory_limit() -> None:
    """Let this process take what it wants, for what is loaded once."""
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGPROF, late)
    # Again and again: a library may swallow one in a callback.
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def judge(reader: Reader, bench: Bench, case: Case) -> bool:
    """Read a case; True: it was accepted, False: it was refused.

    Raises:
        Found: an exception that is not ours, more than MOST_S, or more memory than there is.
    """
    try:
        return _read(reader, bench, case, MOST_S)
    except Found as found:
        if found.kind != "hang":
            raise
    _read(reader, bench, case, PATIENT_S)
    return _read(reader, bench, case, MOST_S)


def _read(reader: Reader, bench: Bench, case: Case, most_s: float) -> bool:
    folder = bench.lay(case)
    limit = sys.getrecursionlimit()
    try:
        with _within(most_s):
            reader.read(folder, case.words)
    except WeightmillError:
        return False
    except _Late as error:
        raise Found("hang", f"late: {_place_of(error)}", _tail(error)) from error
    except MemoryError as error:
        raise Found("allocation", _place_of(error), _tail(error)) from error
    except (Exception, SystemExit) as error:
        raise Found("exception", _place_of(error), _tail(error)) from error
    finally:
        sys.setrecursionlimit(limit)
    return True


def _tail(error: BaseException) -> str:
    said = "".join(traceback.format_exception(error, limit=-6, chain=False))
    return said[-1500:]
