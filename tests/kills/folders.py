"""Kills a job from folder to folder at random moments, again and again, and checks what is there then.

The moments are the changes that it makes to the disk, and up to LONGEST_S after one. After each kill what is visible is
whole and right, and what was recorded as done still is; the same command runs again until it succeeds, takes up every
unit that had a record, ends with the bytes of a job that nobody disturbed, and leaves nothing beside them.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.forks import NONE, Fault, Forks, Ran
from tests.kinds_of_jobs import KINDS, Outputs, hidden, made, outputs, records

LONGEST_S = 0.05  # from the change to the kill
MOST_KILLS = 6  # of one output


@dataclass
class FolderTally:
    """What a campaign counted, and what it found wrong."""

    found: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)  # by kind of job
    runs: int = 0
    seconds: float = 0.0

    @property
    def table(self) -> str:
        rows = [("kills", sum(self.kills.values())), *((f"  {kind}", n) for kind, n in self.kills.items())]
        rows += [("runs", self.runs), ("found wrong", len(self.found)), ("seconds", round(self.seconds))]
        return "\n".join([*(f"{name:32} {number:8}" for name, number in rows), *(f"  {each}" for each in self.found)])


class FolderCampaign:
    """Kills of one kind of job."""

    def __init__(self, kind: str, work: Path, forks: Forks, rng: random.Random, tally: FolderTally) -> None:
        self._kind = kind
        self._work = work
        self._forks = forks
        self._random = rng
        self._tally = tally
        self._source, self._wanted, self._changes = made(work, kind, forks)

    def round(self, number: int, kills: int) -> int:
        """Make one output, by as many runs as it takes; returns the kills."""
        folder, killed = self._work / self._kind / str(number), 0
        while True:
            before = records(folder)
            is_whole = outputs(folder).keys() == self._wanted.keys()
            if is_whole and not hidden(folder):
                break  # killed after the very last step
            fault = self._moment() if killed < kills and (not killed or self._random.random() < 0.6) else NONE
            ran = self._forks.run(*KINDS[self._kind].arguments(self._source, folder), fault=fault)
            self._tally.runs += 1
            if not ran.was_killed:
                self._check_end(folder, ran, before, was_whole=is_whole)
                break
            killed += 1
            self._check(folder, outputs(folder))
            # Outputs that were published have no records any more.
            gone = [path for path, data in before.items() if records(folder).get(path, data) != data]
            if gone:
                self._found(folder, f"records are others: {gone}")
            if not outputs(folder) and before.keys() - records(folder).keys():
                self._found(folder, "records are gone")
        self._tally.kills[self._kind] += killed
        return killed

    def _moment(self) -> Fault:
        after_s = self._random.choice((0.0, self._random.uniform(0.001, LONGEST_S)))
        return Fault(kill_at=self._random.randint(1, self._changes), after_s=after_s)

    def _check_end(self, folder: Path, ran: Ran, before: dict[str, bytes], *, was_whole: bool) -> None:
        # A job that was killed after its last step but one has nothing to do, and its output exists.
        was_over = ran.status == 2 and was_whole and "exists" in ran.err
        if ran.complaint or not (ran.status == 0 or was_over):
            self._found(folder, f"status {ran.status}: {ran.complaint or ran.err.strip()[-400:]}")
            return
        found = outputs(folder)
        self._check(folder, found)
        if missing := self._wanted.keys() - found.keys():
            self._found(folder, f"no output {sorted(missing)}")
        if left := hidden(folder):
            self._found(folder, f"left: {[path.name for path in left]}")
        if "was published before" in ran.err:
            return
        resumed = sum(int(count) for count in re.findall(r"(\d+) of \d+ units? (?:was|were) done", ran.err))
        if not KINDS[self._kind].is_sweep and before and not resumed and "units" in ran.err:
            self._found(folder, f"{len(before)} units had records, and none was taken up: {ran.err[-300:]}")

    def _check(self, folder: Path, found: Outputs) -> None:
        """Check that what is visible is whole and right."""
        for name, output in found.items():
            wanted = self._wanted.get(name)
            if output != wanted:
                files = sorted(output[0].keys() ^ wanted[0].keys()) if wanted else []
                files += [file for file in output[0] if wanted and output[0][file] != wanted[0].get(file)]
                self._found(folder, f"{name} is visible, and not as it should be: {files or 'its report'}")

    def _found(self, folder: Path, what: str) -> None:
        self._tally.found.append(f"{self._kind}, output {folder.name}, run {self._tally.runs}: {what}")


def folder_campaign(work: Path, *, kills: int, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)) -> FolderTally:
    """Kill jobs of each kind, the same number of times."""
    tally, began, rng = FolderTally(), time.monotonic(), random.Random(seed)
    work.mkdir(parents=True, exist_ok=True)
    warm = [KINDS[kind].arguments(KINDS[kind].source(work / "warm" / kind), work / "warmed" / kind) for kind in kinds]
    with Forks(work, warm) as forks:
        for position, kind in enumerate(kinds):
            made_of_kind = FolderCampaign(kind, work, forks, rng, tally)
            left, number = kills * (position + 1) // len(kinds) - kills * position // len(kinds), 0
            while left > 0:
                left -= made_of_kind.round(number, min(left, MOST_KILLS))
                number += 1
    tally.seconds = time.monotonic() - began
    return tally
