"""The folder of this user's caches, where weightmill keeps what it would otherwise do again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "WEIGHTMILL_CACHE"


def default_folder() -> Path:
    """Return $WEIGHTMILL_CACHE, else the platform's folder for caches."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "weightmill"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "weightmill"
