"""What is printed: one way for all texts, whose words may be strangers', to listeners that may leave.

Names in a checkpoint are shown as text: rich takes none of them for markup, and the terminal none for an escape code.
A listener that leaves early (`| head`), a closed output or a full disk behind it end no job: what would be printed then
is lost, and the exit status is that of the work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

from loaders.words import shown

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

NO_TERMINAL = 240  # columns, at which hardly a table has to leave some out
# Whether tables show all columns, in parts below each other; None where that cannot be asked for.
ALL_COLUMNS: ContextVar[bool | None] = ContextVar("ALL_COLUMNS", default=None)


def console(stream: TextIO) -> Console:
    """Return a console on a stream, which shows all that it is given as text.

    It is as wide as the terminal, or as COLUMNS says.
    """
    from rich.console import Console  # slow to import, for a program that asks for JSON, or a user for help
    from rich.segment import Segment

    class PlainConsole(Console):
        all_columns = ALL_COLUMNS.get()  # as tables ask

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                is_text = segment.control is None
                yield Segment(shown(segment.text), segment.style) if is_text else segment

    given = os.environ.get("COLUMNS", "")
    # Of a terminal its own width counts; rich reads COLUMNS itself.
    width = None if stream.isatty() else int(given) if given.isdecimal() and int(given) else NO_TERMINAL
    return PlainConsole(file=stream, markup=False, emoji=False, highlight=False, width=width)


class Patient:
    """A text stream that goes on in silence once nobody takes what is written to it.

    `lost` says why, unless it is a listener that has left, who wants no more. Where an encoding has no such characters,
    they are written as escapes.
    """

    def __init__(self, stream: TextIO, lost: str = "") -> None:
        self._stream = stream
        self.lost = lost
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        # The listener is gone, its disk is full, or the stream is closed.
        except (OSError, ValueError) as error:
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._leave(error)

    def isatty(self) -> bool:
        with suppress(ValueError):
            return self._stream.isatty()
        return False

    def _leave(self, error: OSError | ValueError) -> None:
        if not isinstance(error, BrokenPipeError):
            self.lost = self.lost or getattr(error, "strerror", None) or str(error)
        self._stream = open(os.devnull, "w")  # noqa: PTH123, SIM115  # for the rest of the process

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def patient_streams() -> Iterator[Callable[[], str]]:
    """Within the block, standard output and standard error are there, and writing to them raises nothing.

    What it gives says why standard output did not take what was printed until then; "" if it did.
    """
    closed = _have_descriptors()
    before = sys.stdout, sys.stderr
    output, errors = (_patient(stream, number, closed) for stream, number in zip(before, (1, 2), strict=True))
    sys.stdout, sys.stderr = output, errors

    def lost() -> str:
        output.flush()
        return str(getattr(output, "lost", ""))

    try:
        yield lost
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _patient(stream: TextIO | None, number: int, closed: Collection[int]) -> TextIO:
    # Python has no stream for a descriptor that was closed when it started.
    made: Any = Patient(stream or open(number, "w", closefd=False), "it is closed" if number in closed else "")  # noqa: SIM115
    return made  # type: ignore[no-any-return]


def _have_descriptors() -> list[int]:
    """Open descriptors 0, 1 and 2 on nothing where they are closed: a file of such a number would be printed to.

    Returns those that were closed.
    """
    closed = []
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, which is this one.
            os.open(os.devnull, os.O_RDWR)
            closed.append(number)
    return closed
