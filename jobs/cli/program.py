"""What a command that is shown begins with, so that it can be pasted where the one before it was typed."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

NAME = "weightmill"


def program() -> str:
    """Return the console script's name, or its path as it was typed where the shell would not find it by its name."""
    typed = Path(sys.argv[0])
    if typed.name != NAME:
        return NAME
    found = shutil.which(NAME)
    return NAME if found is not None and typed.samefile(found) else shlex.quote(sys.argv[0])
