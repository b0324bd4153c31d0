"""Progress by bytes or tokens on standard error: a bar on a terminal, elsewhere a line from time to time.

A program that runs the job in its own process is told instead: see `listening`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from jobs.cli.console import console
from jobs.cli.listening import LISTENER
from loaders.progress import Progress as Told
from loaders.storage.traffic import moved_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress
    from rich.text import Text

# Seconds before the first line and between lines, where there is no terminal: the first soon, to show that the job
# runs; later ones rarely, so that a log of hours stays short.
FIRST_LINE_S = 2.0
LINE_S = 10.0
LOOK_S = 0.5  # seconds between two looks at what flies
TOLD_S = 0.1  # seconds between two calls of a program's function: it sees every unit's end, and costs nothing


class Watched(Protocol):
    """What is known of the machines that work, in words."""

    def starting(self) -> str:
        """Say where workers start, as long as none has done anything; else ""."""
        ...

    def summary(self) -> str:
        """Say in a line what should be known beside the bytes; "" where that is nothing."""
        ...

    def machines(self) -> Sequence[str]:
        """Return a line for each machine, if there are several, and one for what is slow or was repeated."""
        ...


class Meter:
    """A progress display, which any thread may add to while it is open. It counts bytes, or another `unit`.

    What stores that are not local have given and taken meanwhile is shown beside it, and what is `watched`. `also` is
    told of each count, by one thread at a time.
    """

    def __init__(
        self, what: str, total: int, unit: str = "bytes", also: Callable[[int], None] | None = None,
        watched: Watched | None = None,
    ) -> None:  # fmt: skip
        self._what = what
        self._unit = unit
        self._also = also
        self._watched = watched
        self._ended = threading.Event()
        self._total = max(1, total)
        self._done = 0
        self._began = self._said = time.monotonic()
        self._moved = moved_bytes()
        self._compiled: float | None = None  # when kernels were last compiled
        self._exit = ExitStack()
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        self._listener = LISTENER.get()
        self._thread, self._last, self._told = threading.get_ident(), "", 0.0
        self.raised: BaseException | None = None  # by the program's function, in a thread of the work
        if self.is_shown and sys.stderr.isatty():
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.text import Text

            class Moved(TextColumn):
                def render(self, _: object) -> Text:
                    return Text(meter.moved)

            class WithMachines(Progress):
                def get_renderables(self) -> Iterable[RenderableType]:
                    yield self.make_tasks_table(self.tasks)
                    yield from meter._below()

            meter = self
            self._below_s, self._lines = 0.0, list[Text]()
            counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
            self._bar = WithMachines(
                TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn(), Moved(""),
                console=console(sys.stderr), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=self._total)

    def __enter__(self) -> Meter:
        from loaders.quantization.kernels.compiling import compiling  # numba, which planning does without

        self._exit.enter_context(compiling(self._compiling))
        if self._bar:
            self._bar.start()
        elif self._watched is not None and self.is_shown:
            # Where nothing moves, nothing is added: while workers start, and when machines hang.
            threading.Thread(target=self._watch, name="progress", daemon=True).start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            with self._lock:
                self._print(time.monotonic())

    def _below(self) -> list[Text]:
        """Return what stands below the bar: machines, or where workers start."""
        from rich.text import Text

        now = time.monotonic()
        if self._watched is not None and now - self._below_s >= LOOK_S:
            said = [line] if (line := self._watched.starting()) else self._watched.machines()
            self._below_s, self._lines = now, [Text(f"  {line}", overflow="ellipsis", no_wrap=True) for line in said]
        return self._lines

    @property
    def is_shown(self) -> bool:
        """Whether it is printed."""
        return self._listener is None or self._listener.shows_progress

    def _compiling(self) -> None:
        """Announce compilation once. Its time is no measure of the rest, so that estimates wait until it is over."""
        is_first, self._compiled = self._compiled is None, time.monotonic()
        if is_first:
            from loaders.quantization.kernels.kept import kept_how

            said = f"compiling kernels for this machine, which are {kept_how()}: some seconds"
            if self._listener is not None:
                self._listener.note(said)
            if self.is_shown:
                print(said, file=sys.stderr, flush=True)

    def add(self, count: int) -> None:
        """Add to the count; `count` is negative if an attempt failed and starts again."""
        with self._lock:
            self._done += count
            if self._also is not None:
                self._also(count)
            if self._bar:
                self._bar.update(self._task, completed=self._done, total=max(self._total, self._done))
            now = time.monotonic()
            if self._done >= self._total or now - self._told >= TOLD_S:
                self._tell(now)
            self._print(now)

    def _print(self, now: float) -> None:
        """Print a line, if it is time for one."""
        if self._bar or not self.is_shown:
            return
        pause = FIRST_LINE_S if self._said == self._began else LINE_S
        if now - self._said >= pause:
            self._said = now
            self._line(now)

    def finished(self, last: str) -> None:
        """Tell a program that a unit of the work is finished."""
        with self._lock:
            self._last = last
            self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        """Call the program's function. What it raises ends the work: at once, or from the thread that began it."""
        if self._listener is None or self._listener.on_progress is None or self.raised is not None:
            return
        self._told = now
        try:
            self._listener.on_progress(
                Told(
                    doing=self._what, done=self._done, total=self._total, counted=self._unit, last=self._last,
                    seconds=now - self._began, jobs=self._listener.jobs,
                )
            )  # fmt: skip
        # Whatever it is: a unit that fails by it would be tried again, and its files called bad.
        except BaseException as error:
            if threading.get_ident() == self._thread:
                raise
            self.raised = error

    @property
    def moved(self) -> str:
        """What was fetched and uploaded since the display was made, with rates; empty if nothing was."""
        took, now = max(1e-9, time.monotonic() - self._began), moved_bytes()
        counts = {word: now[word] - self._moved[word] for word in now}
        return ", ".join(f"{word} {_size(n)} at {_size(n / took)}/s" for word, n in counts.items() if n)

    def _line(self, now: float) -> None:
        if self._watched is not None and (starting := self._watched.starting()):
            print(f"{self._what}: {starting}", file=sys.stderr, flush=True)
            return
        rate = self._done / (now - self._began)
        is_steady = self._compiled is None or now - self._compiled > LINE_S
        # More than was reckoned with may be done: what is shared with another tensor may be worked on twice.
        known = self._total / 50 < self._done < self._total and is_steady
        left = f", about {(self._total - self._done) / rate:.0f} s left" if known else ""
        beside = [self.moved, "" if self._watched is None else self._watched.summary()]
        moved = "".join(f"; {each}" for each in beside if each)
        total = max(self._total, self._done)
        of = f"{self._done / total:.0%} of {self._size(total)}, {self._size(rate)}/s"
        print(
            f"{self._what}: {of}{left}{moved}",
            file=sys.stderr,
            flush=True,
        )

    def _size(self, count: float) -> str:
        return _size(count) if self._unit == "bytes" else f"{count:,.0f} {self._unit}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._exit.close()
        if self._bar:
            self._bar.stop()


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
