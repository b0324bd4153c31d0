"""Joining a file of several units on a cluster, so that none of its bytes pass through the driver.

Where machines share a folder, several of them copy pieces into the file at once. One machine then joins what is left,
as `jobs.output.join` does in this process, and reads the whole file once, for its hash.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jobs.cli.progress import Meter
from jobs.execution.cluster import Cluster, OnBytes, Task, UnitFailed
from jobs.output.join import join, joined_size, start_of
from jobs.output.journal import Done, Journal
from jobs.output.report import WeightFile
from jobs.planning.plan import Unit
from loaders.backends.threads import Stopped
from loaders.errors import StorageError, VerifyFailed
from loaders.layouts.base import Joined
from loaders.specs import OutputFile
from loaders.storage.address import Address
from loaders.storage.hashes import BLOCK

MOVES_AT_ONCE = 8  # machines that copy pieces at once; the disk holds the piece of each twice


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinTask:
    """A `Task` that joins pieces into a file; with `is_move`, it only copies them to their places in the file."""

    gpus: ClassVar[int] = 0
    by_architecture: ClassVar[bool] = False

    name: str
    source: Address  # of the job
    journal: Journal
    joined: Joined
    pieces: tuple[OutputFile, ...]
    done: tuple[Done, ...]
    size: int  # of the file
    threads: int = 1
    is_move: bool = False

    @property
    def unit(self) -> Unit:
        return Unit(self.name, (), (), {})

    @property
    def journals(self) -> tuple[Journal, ...]:
        return (self.journal,)

    @property
    def memory_bytes(self) -> int:
        return 16 * BLOCK

    @property
    def scratch_bytes(self) -> int:
        """The whole file, on its way to the Hub, which takes no parts of one."""
        return self.size if self.journal.output.scheme == "hf" and not self.is_move else 0

    @property
    def work_bytes(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def reach(self) -> None:
        """It reads the journal alone, which its machine is asked about."""

    def run(self, on_bytes: OnBytes, stop: threading.Event) -> JoinReport:
        def count(size: int) -> None:
            if stop.is_set():
                raise Stopped("the joining was cancelled")
            on_bytes(size)

        if self.is_move:
            self._move(count)
            return JoinReport(self.name)
        try:
            return JoinReport(self.name, join(self.joined, self.pieces, self.journal, self.done, count))
        # The kind of an error would be lost on the way.
        except VerifyFailed as error:
            return JoinReport(self.name, error=error)

    def _move(self, count: Callable[[int], None]) -> None:
        destination = self.journal.destination
        for piece in self.pieces:
            count(0)
            place = start_of(piece), self.journal.place(piece)
            destination.assemble(f"files/{self.joined.name}", [place], (), self.size)
            count(piece.size)


@dataclass(frozen=True, slots=True)
class JoinReport:
    """The finished file's entry for the report; none of pieces that were only moved, or if it failed."""

    unit: str
    file: WeightFile | None = None
    error: VerifyFailed | None = None
    attempts: int = 1


def join_on(
    cluster: Cluster, source: Address, joined: Joined, pieces: Sequence[OutputFile], journal: Journal,
    done: Sequence[Done],
) -> WeightFile:  # fmt: skip
    """Join pieces into a finished file on the cluster's machines; returns its entry for the report.

    Raises:
        VerifyFailed: a piece is not what its record says.
        StorageError: no machine could finish it.
    """
    whole = JoinTask(
        name=f"joining-{joined.name}", source=source, journal=journal, joined=joined, pieces=tuple(pieces),
        done=tuple(done), size=joined_size(joined, pieces, journal, done),
    )  # fmt: skip
    moves = list(_moves(whole))
    work_bytes = sum(task.work_bytes for task in (*moves, whole))
    with Meter(f"joining {joined.name}", work_bytes) as meter:
        for tasks in filter(None, (moves, [whole])):
            with closing(_run(cluster, tasks, meter.add)) as reports:
                for report in reports:
                    if report.file is not None:
                        return report.file
    raise StorageError(f"{whole.name}: the cluster ended without a report")


def _moves(whole: JoinTask) -> Generator[JoinTask]:
    """Yield tasks that copy the pieces which are files of their own, a run of neighbours each."""
    destination = whole.journal.destination
    if not destination.is_local:
        return  # the store copies them by itself, or they are streamed
    there = {entry.name for entry in destination.list("pieces")}
    apart = [piece for piece in whole.pieces if piece.name in there]
    count = min(MOVES_AT_ONCE, len(apart))
    for number in range(count):
        mine = tuple(apart[number * len(apart) // count : (number + 1) * len(apart) // count])
        yield replace(whole, name=f"{whole.name}.{number}", pieces=mine, done=(), is_move=True)


def _run(cluster: Cluster, tasks: Sequence[Task[Any]], on_bytes: OnBytes) -> Generator[JoinReport]:
    cluster.check(tasks)
    for outcome in cluster.run(tasks, on_bytes):
        if isinstance(outcome, UnitFailed):
            raise StorageError(f"{outcome.unit}: {outcome.reason}")
        if outcome.error is not None:
            raise outcome.error
        yield outcome
