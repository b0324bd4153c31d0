"""Progress by bytes or tokens on standard error: a bar on a terminal, elsewhere a line from time to time."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from jobs.cli.console import console
from loaders.storage.traffic import moved_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

# Seconds before the first line and between lines, where there is no terminal: the first soon, to show that the job
# runs; later ones rarely, so that a log of hours stays short.
FIRST_LINE_S = 2.0
LINE_S = 10.0


class Meter:
    """A progress display, which any thread may add to while it is open. It counts bytes, or another `unit`.

    What stores that are not local have given and taken meanwhile is shown beside it. `also` is told of each count, by
    one thread at a time.
    """

    def __init__(self, what: str, total: int, unit: str = "bytes", also: Callable[[int], None] | None = None) -> None:
        self._what = what
        self._unit = unit
        self._also = also
        self._total = max(1, total)
        self._done = 0
        self._began = self._said = time.monotonic()
        self._moved = moved_bytes()
        self._compiled: float | None = None  # when kernels were last compiled
        self._exit = ExitStack()
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
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

            meter = self
            counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn(), Moved(""),
                console=console(sys.stderr), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=self._total)

    def __enter__(self) -> Meter:
        from loaders.quantization.kernels.compiling import compiling  # numba, which planning does without

        self._exit.enter_context(compiling(self._compiling))
        if self._bar:
            self._bar.start()
        return self

    def _compiling(self) -> None:
        """Announce compilation once. Its time is no measure of the rest, so that estimates wait until it is over."""
        is_first, self._compiled = self._compiled is None, time.monotonic()
        if is_first:
            from loaders.quantization.kernels.kept import kept_how

            print(
                f"compiling kernels for this machine, which are {kept_how()}: some seconds", file=sys.stderr, flush=True
            )

    def add(self, count: int) -> None:
        """Add to the count; `count` is negative if an attempt failed and starts again."""
        with self._lock:
            self._done += count
            if self._also is not None:
                self._also(count)
            if self._bar:
                self._bar.update(self._task, completed=self._done, total=max(self._total, self._done))
                return
            now = time.monotonic()
            pause = FIRST_LINE_S if self._said == self._began else LINE_S
            if now - self._said >= pause:
                self._said = now
                self._line(now)

    @property
    def moved(self) -> str:
        """What was fetched and uploaded since the display was made, with rates; empty if nothing was."""
        took, now = max(1e-9, time.monotonic() - self._began), moved_bytes()
        counts = {word: now[word] - self._moved[word] for word in now}
        return ", ".join(f"{word} {_size(n)} at {_size(n / took)}/s" for word, n in counts.items() if n)

    def _line(self, now: float) -> None:
        rate = self._done / (now - self._began)
        is_steady = self._compiled is None or now - self._compiled > LINE_S
        # More than was reckoned with may be done: what is shared with another tensor may be worked on twice.
        known = self._total / 50 < self._done < self._total and is_steady
        left = f", about {(self._total - self._done) / rate:.0f} s left" if known else ""
        moved = f"; {self.moved}" if self.moved else ""
        of = f"{min(1.0, self._done / self._total):.0%} of {self._size(max(self._total, self._done))}, {self._size(rate)}/s"
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
        self._exit.close()
        if self._bar:
            self._bar.stop()


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
