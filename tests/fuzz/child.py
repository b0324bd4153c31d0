"""A process that reads cases within limits, for a parent that survives it: lines of JSON in, lines of JSON out.

A line asks for {"reader", "examples", "seed", "known"}: that many cases, by the seed or, with null, the same each time;
faults whose `what` is in `known` are passed over. With "database", a folder in which atheris left what it found, those
are shrunk instead. Or for {"reader", "hostile": true}: the cases that are kept in tests/hostile.

Before a case is read it is written into CURRENT, where the parent finds it if the process dies or hangs.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import SkipTest

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.fuzz import bounds, hostile, seeds
from tests.fuzz.cases import Bench, Case, Reader
from tests.fuzz.readers import READERS

CURRENT = "current"
WARM = 8  # cases that are read before limits apply


class Everything(set[str]):
    def __contains__(self, _: object) -> bool:
        return True


@dataclass
class Tally:
    """What the cases of one reader came to. `found` has the smallest case of each fault, by what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    found: dict[str, tuple[Case, bounds.Found]] = field(default_factory=dict)


class Trial:
    """Cases of one reader, which are read in a folder."""

    def __init__(self, name: str, folder: Path, known: set[str]) -> None:
        self._reader: Reader = READERS[name]
        self._bench = Bench(folder / name)
        self._current = folder / CURRENT
        self.known = known
        self.tally = Tally()

    def read(self, case: Case) -> bool:
        """Read a case, and count it; returns whether it was accepted. Raises Found at a fault that is not known."""
        self.tally.counts["inputs"] += 1
        self._current.write_bytes(pickle.dumps(case))
        try:
            is_accepted = bounds.judge(self._reader, self._bench, case)
            self.tally.counts["accepted" if is_accepted else "refused"] += 1
            return is_accepted
        except bounds.Found as found:
            self.tally.counts[found.kind] += 1
            if found.what in self.known:
                return False
            # The last that fails is the smallest: Hypothesis shrinks.
            self.tally.found[found.what] = case, found
            if found.kind == "hang":
                self.known.add(found.what)  # shrinking it would take hours
                return False
            raise
        finally:
            self._current.unlink()

    def test(self, examples: int, seed: int | None = None, database: str | None = None) -> Callable[[], None]:
        """Return a test of Hypothesis over the reader's cases."""

        def check(case: Case) -> None:
            self.read(case)

        made = settings(
            max_examples=examples, derandomize=seed is None and database is None, deadline=None, print_blob=False,
            database=None if database is None else DirectoryBasedExampleDatabase(database),
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate if database is None else Phase.reuse, Phase.shrink],
        )(given(self._reader.cases)(check))  # fmt: skip
        return made if seed is None else with_seed(seed)(made)

    def warm(self) -> None:
        """Load what the reader needs of libraries and kernels; only then is the memory limited."""
        bounds.lift_memory_limit()
        known, self.known = self.known, Everything()
        self.test(WARM)()
        self.known, self.tally = known, Tally()
        bounds.limit_memory()


def run(trial: Trial, test: Callable[[], None]) -> dict[str, Any]:
    """Run a test to its end, and return what it came to as JSON."""
    # Of several faults the tally has each; a test of a database's cases is skipped if there are none.
    with suppress(BaseExceptionGroup, bounds.Found, SkipTest):
        test()
    rows = [
        {"kind": found.kind, "what": what, "trace": found.trace, "case": pickle.dumps(case).hex()}
        for what, (case, found) in trial.tally.found.items()
    ]
    return {"counts": trial.tally.counts, "found": rows}


def prepare(folder: Path) -> None:
    """Make this process fit for cases: quiet, and with all libraries and kernels that valid files need."""
    warnings.simplefilter("ignore")
    seeds.use(folder / "seeds")
    os.environ.pop("RAY_ADDRESS", None)


def serve(folder: Path) -> None:
    """Answer the lines of standard input."""
    prepare(folder)
    # Libraries may print to standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    work = folder / str(os.getpid())
    work.mkdir(parents=True)
    print(work, file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked["reader"]
        trial = Trial(name, work, set(asked.get("known", ())))
        trial.warm()
        if asked.get("hostile"):
            for kept in hostile.kept(name):
                with suppress(bounds.Found):
                    if trial.read(kept.case) and kept.is_refused:
                        trial.tally.found[kept.name] = kept.case, bounds.Found("exception", f"{kept.name} is accepted")
            answer = run(trial, lambda: None)
        else:
            answer = run(trial, trial.test(asked["examples"], asked.get("seed"), asked.get("database")))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
