"""The sign of life of a job: a small file in its journal that the driver writes anew every few seconds.

life.json says what is done, what flies and where, who drives it, and at last how the driver left it. It is told from
outside, by the store's own time, how old it is. Resuming never reads it: what is done is what has a record.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from jobs.output.journal import LIFE, Journal
from loaders.errors import WeightmillError
from loaders.storage.address import without_secrets
from loaders.storage.hashes import opened, sealed

# Seconds between two signs: in a folder, where one is a file, and in a store, where it is a request.
LOCAL_S, REMOTE_S = 5.0, 30.0
FIRST_S = 1.0  # after the first, which knows of no units yet
SHARE = 20  # a sign may take a share of the time of one in so many
# Seconds without a sign after which a driver is taken for frozen or gone: a disk or a store may be slow for a while.
SILENT_S, MISSED = 60.0, 6
END_S = 10.0  # that the end of a job waits for a sign on its way
MOST = 500  # flying units, and machines, that a sign names; of failed units some
MOST_FAILED = 20
LONGEST = 2000  # characters of a reason

State = Literal["running", "stopped", "failed", "published"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlyingUnit:
    """An attempt at a unit: where it runs, for how long, the bytes that it has done, and when it last did any."""

    unit: str
    machine: str
    seconds: float
    bytes: int
    still_s: float  # since it last moved a byte


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSeen:
    """A machine: units that fly and are done there, repeated attempts, work bytes, and bytes per second of late."""

    name: str
    flying: int
    done: int
    retries: int
    bytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A look at work that is under way. Bytes are of the decoded weights to work on, counted once for each job."""

    doing: str
    seconds: float  # since it began
    units: int  # that were to do when it began
    done: int
    retries: int
    work_bytes: int
    done_bytes: int
    bytes_per_s: float  # over the last seconds
    failed: Mapping[str, str] = field(default_factory=dict)  # reasons by unit
    machines: tuple[MachineSeen, ...] = ()
    flying: tuple[FlyingUnit, ...] = ()  # the oldest first

    @property
    def mean_bytes_per_s(self) -> float:
        return self.done_bytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The time that the rest takes at the mean rate; None as long as too little is done to say."""
        rate, left = self.mean_bytes_per_s, self.work_bytes - self.done_bytes
        return left / rate if left >= 0 and self.done_bytes > self.work_bytes / 50 and rate > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """A sign of life. Times are seconds since 1970 by the driver's clock; `units` are all of the job."""

    state: State
    why: str  # of a job that failed
    host: str
    pid: int
    started: float
    told: float
    every_s: float
    versions: Mapping[str, str]
    cluster: str
    jobs_in_pass: int
    units: int
    units_done: int  # those of earlier attempts as well
    units_resumed: int
    seen: Seen

    @property
    def silent_after_s(self) -> float:
        """Seconds without a further sign after which the driver is frozen, or gone."""
        return max(SILENT_S, MISSED * self.every_s)

    def to_bytes(self) -> bytes:
        return sealed(to_json(self, inf_nan_mode="constants"))


LIVES = TypeAdapter(Life)


def life_from(raw: bytes) -> Life | None:
    """Read a sign of life; None if it is damaged, or of another version of weightmill."""
    content = opened(raw)
    try:
        return None if content is None else LIVES.validate_json(content, strict=True)
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A job of which signs are given: its journal, all its units, those done before, and how many are done now."""

    journal: Journal
    units: int
    resumed: int
    done: Callable[[], int]
    failure: Callable[[], str]  # why it failed; "" as long as it has not


class SignsOfLife:
    """A thread that gives signs of life of the jobs of a pass, beside the work. What it cannot write, it leaves."""

    def __init__(
        self, jobs: Sequence[Told], seen: Callable[[], Seen], cluster: str, versions: Mapping[str, str]
    ) -> None:  # fmt: skip
        self._jobs, self._seen, self._cluster, self._versions = jobs, seen, cluster, versions
        self._started = time.time()
        self._every_s = max((LOCAL_S if j.journal.destination.is_local else REMOTE_S for j in jobs), default=LOCAL_S)
        self._stop = threading.Event()
        self._is_heard = True  # whether the last sign was written
        self._thread = threading.Thread(target=self._give, name="signs-of-life", daemon=True)

    def _give(self) -> None:
        for number in itertools.count():
            began = time.monotonic()
            written = [self._put(job, "running") for job in self._jobs]
            self._is_heard = all(written)
            took = time.monotonic() - began
            if self._stop.wait(max(self._every_s if number else FIRST_S, SHARE * took)):
                return

    def _put(self, job: Told, state: State, why: str = "") -> bool:
        failure = job.failure()
        life = Life(
            state="failed" if failure else state,
            why=without_secrets(failure or why)[:LONGEST],
            host=socket.gethostname(),
            pid=os.getpid(),
            started=self._started,
            told=time.time(),
            every_s=self._every_s,
            versions=self._versions,
            cluster=self._cluster,
            jobs_in_pass=len(self._jobs),
            units=job.units,
            units_done=job.done(),
            units_resumed=job.resumed,
            seen=self._seen(),
        )
        # A full disk, a store that does not answer: the work itself will meet it, and say so.
        with suppress(WeightmillError, OSError):
            job.journal.destination.put(LIFE, life.to_bytes())
            return True
        return False

    @contextmanager
    def given(self) -> Iterator[None]:
        """Give signs during the block, and at its end one that says how it ended."""
        self._thread.start()
        state, why = "published", ""
        try:
            yield
        except KeyboardInterrupt:
            state = "stopped"
            raise
        except BaseException as error:
            state, why = "failed", str(error)
            raise
        finally:
            self._stop.set()
            self._thread.join(END_S)
            # Nobody waits for a store that does not answer: neither for a sign on its way, nor for a last one.
            if not self._thread.is_alive() and self._is_heard:
                for job in self._jobs:
                    self._put(job, state, why)  # type: ignore[arg-type]
