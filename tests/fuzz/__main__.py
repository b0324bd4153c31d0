"""Fuzz readers for some minutes: python -m tests.fuzz READER|all [minutes=10] [seed=0] [guided=true|false].

Every new fault is kept in tests/hostile, and the status is 1. Coverage guides half of the time if atheris is installed
(pip install -e '.[fuzz]'); the other half, and without it all, is Hypothesis' own choice.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.fuzz.campaign import fuzz, is_guided
from tests.fuzz.readers import READERS


def main(*arguments: str) -> int:
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    names = [word for word in arguments if "=" not in word]
    unknown = {*names} - {*READERS, "all"} or {*given} - {"minutes", "seed", "guided"}
    if unknown or not names:
        print(
            f"{__doc__}\nreaders: {', '.join(READERS)}; unknown: {', '.join(sorted(unknown)) or 'none'}",
            file=sys.stderr,
        )
        return 2
    readers = [*READERS] if "all" in names else names
    guided = given.get("guided", "true") == "true" and is_guided()
    with tempfile.TemporaryDirectory() as folder:
        minutes, seed = float(given.get("minutes", 10)), int(given.get("seed", 0))
        totals = fuzz(readers, minutes, seed, Path(folder), guided=guided)
    print(totals.table)
    return int(bool(totals.found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
