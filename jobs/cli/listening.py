"""Who hears of a running job, where that is a program in this process and no person at a terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from loaders.progress import OnProgress

log = logging.getLogger("weightmill")


@dataclass
class Listener:
    """A program that runs a job: it gets notes and progress, and nothing is printed.

    With `shows_progress`, progress is printed as for a person.
    """

    on_progress: OnProgress | None = None
    shows_progress: bool = False
    notes: list[str] = field(default_factory=list)
    jobs: tuple[str, ...] = ()  # of a sweep, those that are worked on

    def note(self, text: str) -> None:
        """Keep a note, and log it."""
        self.notes.append(text)
        log.info("%s", text)


# Of the thread that runs the job, which says all that there is to say; None for the commands, which print.
LISTENER: ContextVar[Listener | None] = ContextVar("LISTENER", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the block, a program hears what else would be printed."""
    token = LISTENER.set(listener)
    try:
        yield
    finally:
        LISTENER.reset(token)


@contextmanager
def working_on(*jobs: str) -> Iterator[None]:
    """Within the block, progress is that of these jobs of a sweep; names that are empty are of no sweep."""
    if (listener := LISTENER.get()) is None:
        yield
        return
    before, listener.jobs = listener.jobs, tuple(name for name in jobs if name)
    try:
        yield
    finally:
        listener.jobs = before
