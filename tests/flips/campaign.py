"""Flips single bits of files, and looks at who notices.

In a published output: `verify` must fail, or the bit must mean nothing: white space of a document, or what no hash
covers since weightmill writes it anew: the report's account of the run, and the block in the model card. In the journal
of a killed job: the same command must end with the right output, or stop, say which file is damaged, and leave nothing
visible. Every end is an exit status and a line, never a traceback.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.output.card_block import without_blocks
from loaders.storage.base import OUR_REPORT
from tests.forks import Fault, Forks
from tests.kinds_of_jobs import KINDS, Outputs, as_json, hidden, made, outputs, records

SINGLE = tuple(kind for kind in KINDS if kind != "sweep")
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")
HEAD = 4096  # bytes at the beginning of a weight file that count as its header, and as many at its end as its tail


@dataclass
class Tally:
    """What a campaign counted, by what was flipped, and what it found wrong."""

    found: list[str] = field(default_factory=list)
    noticed: Counter[str] = field(default_factory=Counter)
    harmless: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def table(self) -> str:
        lines = [f"{'flipped in':32} {'noticed':>10} {'harmless':>10}"]
        for place in sorted(self.noticed.keys() | self.harmless.keys()):
            lines.append(f"{place:32} {self.noticed[place]:10} {self.harmless[place]:10}")
        lines += [f"{'found wrong':32} {len(self.found):10}", f"{'seconds':32} {self.seconds:10.0f}"]
        return "\n".join([*lines, *(f"  {each}" for each in self.found)])


def places(folder: Path) -> dict[str, list[tuple[Path, range]]]:
    """Return what of an output can be flipped: ranges of files, by their kind, so that small files are met as often."""
    found: dict[str, list[tuple[Path, range]]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        size = path.stat().st_size
        if path.suffix in WEIGHTS:
            head, tail = min(HEAD, size // 2), max(size - HEAD, size // 2)
            parts = {"headers": range(head), "weights": range(head, tail), "tails": range(tail, size)}
            for name, part in parts.items():
                found.setdefault(name, []).extend([(path, part)] if len(part) else [])
        else:
            known = {OUR_REPORT: "report", "config.json": "config.json"}
            name = "index" if path.name.endswith(".index.json") else known.get(path.name, "other files")
            found.setdefault(name, []).append((path, range(size)))
    return {name: ranges for name, ranges in found.items() if ranges}


def flip(path: Path, at: int, bit: int) -> bytes:
    """Flip a bit in place; returns what the file was. Its times stay: nobody is told."""
    before, status = path.read_bytes(), path.stat()
    data = bytearray(before)
    data[at] ^= 1 << bit
    _write(path, bytes(data), status)
    return before


def _write(path: Path, data: bytes, status: os.stat_result) -> None:
    # In place, as a disk decays: the inode stays as well.
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


class FlipCampaign:
    """Flips in outputs and journals of one kind of job."""

    def __init__(self, kind: str, work: Path, forks: Forks, rng: random.Random, tally: Tally) -> None:
        self._kind = kind
        self._folder = work / kind
        self._forks = forks
        self._random = rng
        self._tally = tally
        self._source, self._wanted, self._changes = made(work, kind, forks)

    def published(self, flips: int) -> None:
        """Flip bits in the published output, one at a time."""
        out = self._folder / "wanted" / "out"
        found = places(out)
        for number in range(flips):
            name = sorted(found)[number % len(found)]
            path, part = self._random.choice(found[name])
            at, bit, status = self._random.choice(part), self._random.randrange(8), path.stat()
            before = flip(path, at, bit)
            ran = self._forks.run("verify", out, "cluster=local")
            where = f"{self._kind}: bit {bit} of byte {at} of {path.relative_to(out)}"
            if ran.complaint:
                self._tally.found.append(f"{where}: {ran.complaint}")
            elif ran.status:
                self._tally.noticed[name] += 1
            elif _means_the_same(path, before):
                self._tally.harmless[name] += 1
            else:
                self._tally.found.append(f"{where}: not noticed")
            _write(path, before, status)

    def left(self, flips: int) -> None:
        """Flip a bit in what a killed job left, and run the job again; for every flip a new job."""
        for number in range(flips):
            folder = self._folder / f"left{number}"
            command = KINDS[self._kind].arguments(self._source, folder)
            while not records(folder):
                shutil.rmtree(folder, ignore_errors=True)
                moment = self._random.randint(self._changes // 4, self._changes * 9 // 10)
                self._forks.run(*command, fault=Fault(kill_at=moment))
            [journal] = hidden(folder)
            areas = [path for path in sorted(journal.iterdir()) if path.is_file() or any(path.iterdir())]
            area = self._random.choice(areas)
            files = [path for path in sorted([area, *area.rglob("*")]) if path.is_file() and path.stat().st_size]
            if files:
                self._flip_left(folder, self._random.choice(files), command)
            shutil.rmtree(folder)

    def _flip_left(self, folder: Path, path: Path, command: Sequence[str]) -> None:
        at, bit = self._random.randrange(path.stat().st_size), self._random.randrange(8)
        name = path.relative_to(folder).parts[1]
        where = f"{self._kind}: bit {bit} of byte {at} of {path.relative_to(folder)}, which a killed job left"
        flip(path, at, bit)
        ran = self._forks.run(*command)
        found: Outputs = outputs(folder)
        if ran.complaint:
            self._tally.found.append(f"{where}: {ran.complaint}")
        elif found == self._wanted:  # by this run, or by the one that was killed
            self._tally.harmless[f"left: {name}"] += 1
        elif ran.status and not found and path.name in ran.err:
            self._tally.noticed[f"left: {name}"] += 1
        else:
            said = ran.err.strip()[-300:]
            self._tally.found.append(f"{where}: status {ran.status}, and the output is not as it should be: {said}")


def _means_the_same(path: Path, before: bytes) -> bool:
    """Whether a document says the same as before, apart from what weightmill writes anew."""
    after = path.read_bytes()
    if path.name == "README.md":
        return without_blocks(before) == without_blocks(after)
    one, other = as_json(before), as_json(after)
    if path.name == OUR_REPORT and isinstance(one, dict) and isinstance(other, dict):
        one, other = ({key: value for key, value in each.items() if key != "run"} for each in (one, other))
    return path.suffix == ".json" and one is not None and one == other


def campaign(work: Path, *, flips: int, seed: int = 0, kinds: Sequence[str] = SINGLE) -> Tally:
    """Flip so many bits, half of them in published outputs, and half in what killed jobs left."""
    tally, rng, began = Tally(), random.Random(seed), time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    warm = []
    for kind in kinds:
        warm.append(KINDS[kind].arguments(KINDS[kind].source(work / "warm" / kind), work / "warmed" / kind))
        warm.append(["verify", str(work / "warmed" / kind / "out"), "cluster=local"])
    with Forks(work, warm) as forks:
        for position, kind in enumerate(kinds):
            mine = flips * (position + 1) // len(kinds) - flips * position // len(kinds)
            one = FlipCampaign(kind, work, forks, rng, tally)
            one.published(mine - mine // 2)
            one.left(mine // 2)
    tally.seconds = time.monotonic() - began
    return tally
