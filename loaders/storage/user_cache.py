"""The folder of this user's caches, where weightmill keeps what it would otherwise do again."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

VARIABLE = "WEIGHTMILL_CACHE"


def default_folder() -> Path:
    """Return $WEIGHTMILL_CACHE, else the platform's folder for caches, else this user's own below the temporary one.

    The last is for users without a home that they may write, as containers have them. It need not exist, nor be one
    that can be made: where no folder can be written, that shows when something is to be kept.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    found = _platform_folder()
    if found is not None and can_be_made(found):
        return found
    return temporary_folder() or found or Path(os.sep, "weightmill")


def _platform_folder() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute() and sys.platform != "darwin":
        return Path(base) / "weightmill"
    try:
        home = Path.home()
    # There is no HOME, and the system has no entry for this user.
    except RuntimeError:
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "weightmill"


def can_be_made(folder: Path) -> bool:
    """Whether a folder is there and may be written, or may be made."""
    there = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), Path(os.sep))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def temporary_folder() -> Path | None:
    """Return a folder below the temporary one that nobody else may write; None if there is none.

    Others may have made one of its name, to have us read what they put there.
    """
    if not hasattr(os, "getuid"):
        return None
    try:
        folder = Path(tempfile.gettempdir()) / f"weightmill-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    # No temporary folder can be written, or a file has the name.
    except OSError:
        return None
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if is_ours else None
