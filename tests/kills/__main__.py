"""Kills jobs at random points, again and again, and checks what readers and reruns find.

    python -m tests.kills kills=100 from=s3 to=s3 quant=nf4 seed=0    # one job, from store to store
    python -m tests.kills kills=100 from=folder to=folder seed=0      # jobs of every kind, in folders
                          kinds=nf4,gguf,bin,packed,qmodel,auto,sweep

It ends with status 1 if anything was found.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.kills.campaign import Options, Tally, campaign
from tests.kills.folders import FolderTally, folder_campaign
from tests.kills.processes import fork, serve
from tests.kinds_of_jobs import KINDS


def main(*arguments: str) -> int:
    if arguments[:1] == ("serve",):
        serve()
    elif arguments[:1] == ("fork",):
        fork(arguments[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            given = dict(argument.partition("=")[::2] for argument in arguments)
            if given.get("from") == given.get("to") == "folder":
                numbers = {name: int(given[name]) for name in ("kills", "seed") if name in given}
                kinds = given.get("kinds", ",".join(KINDS)).split(",")
                tally: FolderTally | Tally = folder_campaign(Path(folder), **{"kills": 100, **numbers}, kinds=kinds)
            else:
                tally = campaign(Options.of(arguments), Path(folder))
        print(tally.table)
        return int(bool(tally.found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
