"""Asking the machines of a Ray cluster, side by side, whether they can do a job's units, and judging the answers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from jobs.execution.cluster import Task
from jobs.execution.ray.asking import Answer, Facts, Question, files_of, journals_of, look_remotely, seen
from jobs.execution.ray.flights import said_by_ray
from jobs.execution.ray.machines import Machine
from loaders.errors import StorageError
from loaders.storage.atomic import TEMPORARY
from loaders.storage.settings import current

ASK_S = 120.0  # seconds that a machine has to answer whether it can work, with the start of a worker
# Errors of Ray that tell of a machine which died meanwhile: it has not answered, and is asked anew if it is there yet.
GONE = ("TaskUnschedulableError", "NodeDiedError")
CLOCK_S = 60.0  # a clock that differs by more is said: stores refuse requests that are minutes old


@dataclass(frozen=True)
class Verdict:
    """What came of asking a machine: why it is left out (else ""), what it runs, and what a person should know."""

    machine: Machine
    fault: str
    facts: Facts | None = None
    remark: str = ""


@dataclass(frozen=True)
class _Asked:
    machine: Machine
    at_s: float  # by this machine's clock, as `time.time` tells it
    since_s: float  # by `time.monotonic`


class Looks:
    """The questions to machines that are under way, and the file in each journal by which they know the output."""

    def __init__(self, ray: Any, tasks: Sequence[Task[Any]], *, ships_code: bool) -> None:
        self._ray, self._ships_code = ray, ships_code
        self._here = Facts()
        self._asked: dict[Any, _Asked] = {}
        self._journals = journals_of(tasks)
        self._has_gpu_units = any(task.gpus for task in tasks)
        self._question = Question(
            task=tasks[0],
            files=files_of(tasks),
            outputs=tuple((journal.output, journal.key) for journal in self._journals),
            name=f"asked-{secrets.token_hex(6)}{TEMPORARY}",
            token=secrets.token_bytes(16),
            scratch_bytes=max(task.scratch_bytes for task in tasks),
        )
        for journal in self._journals:
            journal.destination.put(self._question.name, self._question.token)
        self._remote = ray.remote(look_remotely)

    @property
    def under_way(self) -> set[str]:
        """The ids of the machines that have not answered yet."""
        return {asked.machine.id for asked in self._asked.values()}

    def forget(self, machines: Collection[str]) -> None:
        """Wait no longer for machines that are gone."""
        self._asked = {sent: asked for sent, asked in self._asked.items() if asked.machine.id not in machines}

    def ask(self, machine: Machine) -> None:
        """Send the question to a machine."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        settings = replace(current(), patience_s=min(current().patience_s, ASK_S / 4), read_limit=None)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": On(machine.id, soft=False)}
        question = replace(self._question, backend="cuda" if self._has_gpu_units and machine.gpus else "cpu")
        sent = self._remote.options(**options).remote(question, settings)
        self._asked[sent] = _Asked(machine, time.time(), time.monotonic())

    def answered(self, timeout_s: float = 0) -> Iterator[Verdict]:
        """Yield a verdict on each machine that has answered, or has been silent for ASK_S."""
        if not self._asked:
            return
        ready, _ = self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=timeout_s)
        for sent in ready:
            asked = self._asked.pop(sent)
            try:
                answer = self._ray.get(sent)
            except self._ray.exceptions.RayError as error:
                if type(error).__name__ == "OutOfMemoryError":
                    yield Verdict(asked.machine, "it is short of memory")
                elif type(error).__name__ not in GONE:
                    yield Verdict(asked.machine, said_by_ray(error))
            else:
                yield self._judged(asked, answer)
        late = time.monotonic() - ASK_S
        for sent in [sent for sent, asked in self._asked.items() if asked.since_s <= late]:
            yield Verdict(self._asked.pop(sent).machine, f"no answer within {ASK_S:.0f} s")

    def _judged(self, asked: _Asked, answer: Answer) -> Verdict:
        # What was written there is removed in any case.
        unseen = seen(self._journals, answer.wrote) if not answer.fault else self._drop(answer.wrote)
        fault = difference(self._here, answer.facts, ships_code=self._ships_code) or answer.fault or unseen
        early, late = asked.at_s - answer.facts.clock_s, answer.facts.clock_s - time.time()
        remark = f"its clock is {max(early, late):.0f} s {'behind' if early > late else 'ahead'}"
        if answer.facts.numpy != self._here.numpy:
            remark = f"it has numpy {answer.facts.numpy}, and this machine {self._here.numpy}"
        elif max(early, late) < CLOCK_S:
            remark = ""
        return Verdict(asked.machine, fault, answer.facts, remark)

    def _drop(self, name: str) -> str:
        for journal in self._journals:
            with suppress(StorageError):
                journal.destination.drop(name)
        return ""

    def close(self) -> None:
        self._drop(self._question.name)


def difference(here: Facts, there: Facts, *, ships_code: bool) -> str:
    """Return why a machine's Python and libraries cannot do the same work as here; an empty text if they can."""
    for what, one, other in (("Python", here.python, there.python), ("numba", here.numba, there.numba)):
        if _minor(one) != _minor(other):
            return f"it has {f'{what} {other}' if other else f'no {what}'}, and this machine {one or 'none'}"
    if not ships_code and here.code != there.code:
        return f"its weightmill is another (code {there.code}, here {here.code}); cluster.ship_code=true sends this one"
    return ""


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
