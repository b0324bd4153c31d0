"""The first moments of `python -m jobs.VERB`, while libraries are imported: interrupts and limits end it in one line.

There is nothing yet that would have to be tidied up. This module imports nothing that is not loaded already.
"""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType
from typing import Any

INTERRUPTED = 130
# How libraries say that this process may have no more memory, threads or descriptors.
LIMITS = (
    "can't start new thread", "failed to map segment", "Cannot allocate memory", "cannot allocate memory",
    "Too many open files", "cannot create thread", "pthread_create", "Resource temporarily unavailable",
    "error return without exception set",  # what Python makes of compiled code that gets no memory
)  # fmt: skip


_is_program = False


def is_program() -> bool:
    """Whether this process is weightmill's own, with its handlers of signals: it runs a verb as a program, or units."""
    return _is_program


def be_program() -> None:
    """Say that this process is weightmill's own."""
    global _is_program  # noqa: PLW0603  # of the process, as its handlers of signals are
    _is_program = True


def watch() -> None:
    """Watch over the imports that follow."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What a parent has had ignored stays so.
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _stop)
    sys.excepthook = _say


def imported() -> None:
    """Give interrupts back to Python once a verb begins: it raises KeyboardInterrupt, so that `finally` blocks run."""
    be_program()
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def limit_of(error: BaseException) -> str | None:
    """Return in a line which limit of this process an error comes of; None if it comes of none."""
    said = " ".join(str(error).split())
    is_limit = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError | OSError | SystemError) and any(each in said for each in LIMITS)
    )
    if not is_limit:
        return None
    what = said or "no memory"
    return (
        f"a limit of this process is too low ({what:.200}): raise it (`ulimit -v`, `-u`, `-n`, or the container's), or"
        " give fewer threads"
    )


def _stop(number: int, frame: Any) -> None:
    os.write(2, b"weightmill: stopped: interrupted\n")
    os._exit(INTERRUPTED)


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    found = limit_of(error)
    if found is None:
        import traceback

        from loaders.storage.address import without_secrets

        # What failed may quote an address.
        print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
    else:
        print(f"weightmill: failed: {found}", file=sys.stderr)
