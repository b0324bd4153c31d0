"""Commands of this checkout that tests start as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loaders.places import ROOT

# A shell that starts the tests in the background makes them ignore SIGINT, and nohup SIGHUP; whatever they start
# inherits that.
AS_IN_A_TERMINAL = (
    "import os, signal, sys; [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)];"
    " os.execv(sys.executable, sys.argv[1:])"
)


def start(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS` in the checkout, as a user would in a terminal: SIGINT stops it, no cluster is known.

    Output and errors are pipes unless `options`, those of Popen, say otherwise.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-c", AS_IN_A_TERMINAL, sys.executable, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command, cwd=ROOT, text=True, env={**inherited, **(environment or {})}, **{**pipes, **options}
    )
