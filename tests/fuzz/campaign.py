"""Many cases of many readers, in processes that may die; what they find is kept in tests/hostile."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loaders.places import ROOT
from tests.fuzz import hostile
from tests.fuzz.cases import Case
from tests.fuzz.child import CURRENT

DEAD_S = 120.0  # for which one case is read, in a way that no signal ends
ROUND = 2000  # cases between two looks at the clock
ERRORS = "errors.txt"  # what a child prints on standard error
COLUMNS = ("inputs", "accepted", "refused", "exception", "hang", "allocation", "crash")
# glibc reserves 64 MiB of addresses for each thread's heap, which would count against the limit.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


@dataclass
class Found:
    """A fault of a reader, and the smallest case that shows it."""

    reader: str
    kind: str
    what: str
    trace: str
    case: Case


@dataclass
class Totals:
    """What a campaign came to, by reader."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)

    @property
    def table(self) -> str:
        lines = [f"{'reader':16}" + "".join(f"{column:>12}" for column in COLUMNS)]
        rows = {**self.counts, "all": sum(self.counts.values(), Counter[str]())}
        lines += [f"{name:16}" + "".join(f"{row[column]:12}" for column in COLUMNS) for name, row in rows.items()]
        lines += [f"{found.reader}: {found.kind}: {found.what}" for found in self.found]
        return "\n".join(lines)


class Worker:
    """A child that reads cases, started again when it dies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "seeds").mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[str] | None = None
        self._work = folder

    def ask(self, reader: str, **asked: Any) -> tuple[Counter[str], list[Found]]:
        """Let the child read cases; returns the counts, and what was found."""
        process = self._alive()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"reader": reader, **asked}) + "\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 5)[0]:
            if self._is_stuck():
                process.kill()
        line = process.stdout.readline()
        if not line:
            return self._died(reader, process)
        answer = json.loads(line)
        found = [
            Found(reader, row["kind"], row["what"], row["trace"], pickle.loads(bytes.fromhex(row["case"])))
            for row in answer["found"]
        ]
        return Counter(answer["counts"]), found

    def _alive(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = start("-m", "tests.fuzz.child", str(self._folder), errors=self._folder / ERRORS)
            assert self._process.stdout is not None
            self._work = Path(self._process.stdout.readline().strip())
        return self._process

    def _is_stuck(self) -> bool:
        try:
            return time.time() - (self._work / CURRENT).stat().st_mtime > DEAD_S
        except FileNotFoundError:
            return False

    def _died(self, reader: str, process: subprocess.Popen[str]) -> tuple[Counter[str], list[Found]]:
        status = process.wait()
        self.close()
        current = self._work / CURRENT
        said = (self._folder / ERRORS).read_text()[-2000:]
        assert current.exists(), f"the process ended with status {status}, and read no case: {said}"
        kind = "hang" if status == -9 else "crash"
        what = f"{kind}: the process ended with status {status}"
        return Counter({kind: 1, "inputs": 1}), [Found(reader, kind, what, "", pickle.loads(current.read_bytes()))]

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(*arguments: str, errors: Path) -> subprocess.Popen[str]:
    environment, pipe = {**os.environ, **ENVIRONMENT}, subprocess.PIPE
    with errors.open("w") as file:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=file)


def is_guided() -> bool:
    """Whether atheris is installed, so that coverage guides."""
    return importlib.util.find_spec("atheris") is not None


def fuzz(readers: Sequence[str], minutes: float, seed: int, folder: Path, *, guided: bool) -> Totals:
    """Fuzz readers in turn, each for its share of the time, and keep every new fault."""
    totals, known = Totals(), set[str]()
    for number, reader in enumerate(readers):
        ends = time.monotonic() + minutes * 60 / len(readers)
        counts = totals.counts[reader] = Counter[str]()
        with Worker(folder) as worker:
            while (left := ends - time.monotonic()) > 0:
                if guided and left > 10:
                    database = _guide(reader, min(left / 2, 300), seed, folder)
                    counts += _counts_of(database)
                    _take(totals, known, *worker.ask(reader, examples=1, database=str(database), known=[*known])[1:])
                asked = {"examples": min(ROUND, max(50, int(counts["inputs"] / 5))), "seed": seed, "known": [*known]}
                new, found = worker.ask(reader, **asked)
                counts += new
                _take(totals, known, found)
                seed += 1
        print(f"{number + 1}/{len(readers)} {reader}: {dict(counts)}", file=sys.stderr, flush=True)
    return totals


def _take(totals: Totals, known: set[str], found: Sequence[Found]) -> None:
    for each in found:
        if each.what in known:
            continue
        known.add(each.what)
        totals.found.append(each)
        place = hostile.keep(each.reader, each.what, each.case)
        print(f"{each.reader}: {each.kind}: {each.what}: {place}\n{each.trace}", file=sys.stderr, flush=True)


def _guide(reader: str, seconds: float, seed: int, folder: Path) -> Path:
    """Let atheris look for faults; returns the database with what Hypothesis can shrink."""
    place = folder / "guided" / reader
    place.mkdir(parents=True, exist_ok=True)
    process = start(
        "-m", "tests.fuzz.guided", reader, str(folder), f"{seconds:.0f}", str(seed + 1), errors=place / ERRORS
    )
    process.communicate()
    assert process.returncode == 0, (place / ERRORS).read_text()[-2000:]
    return place


def _counts_of(database: Path) -> Counter[str]:
    counts: Mapping[str, int] = json.loads((database / "counts.json").read_text())
    return Counter(counts)
