"""Flip bits: python -m tests.flips [flips=200] [seed=0] [kinds=nf4,gguf]. The status is 1 if anything was found."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.flips.campaign import SINGLE, campaign


def main(*arguments: str) -> int:
    given = dict(argument.partition("=")[::2] for argument in arguments)
    kinds = given.pop("kinds", ",".join(SINGLE)).split(",")
    numbers = {"flips": 200, "seed": 0, **{name: int(value) for name, value in given.items()}}
    if {*numbers} - {"flips", "seed"} or {*kinds} - {*SINGLE}:
        print(f"{__doc__}\nkinds: {', '.join(SINGLE)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(Path(folder), flips=numbers["flips"], seed=numbers["seed"], kinds=kinds)
    print(tally.table)
    return int(bool(tally.found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
