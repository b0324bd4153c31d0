"""Kills a job from store to store at random points, again and again, and checks what readers and reruns find.

    python -m tests.kills kills=100 from=s3 to=s3 quant=nf4 seed=0

It ends with status 1 if anything was found.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.kills.campaign import Options, campaign
from tests.kills.processes import fork, serve


def main(*arguments: str) -> int:
    if arguments[:1] == ("serve",):
        serve()
    elif arguments[:1] == ("fork",):
        fork(arguments[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            tally = campaign(Options.of(arguments), Path(folder))
        print(tally.table)
        return int(bool(tally.found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
