"""The folders that Hydra makes for a sweep, in .sweeps beside the outputs; they hold nothing but a copy of the request.

A sweep removes its own at its end, and those of sweeps that were killed: the lock on a folder ends with its process.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack, suppress
from pathlib import Path

COPY = "multirun.yaml"


class SweepFolders:
    """The folder of one sweep, and those that had to be made above it."""

    def __init__(self) -> None:
        self._made: set[Path] = set()
        self._locks = ExitStack()

    def begin(self, folder: Path) -> None:
        """Make the folder, and hold its lock, unless a sweep of the same second does, or its filesystem has none."""
        self._made.update(each for each in (folder, *folder.parents) if not each.exists())
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            _lock(folder, self._locks)
            # One that a killed sweep of the same second left is this sweep's now.
            if folder.parent.name.startswith("."):
                self._made.add(folder)
        for other in folder.parent.iterdir() if folder.parent.name.startswith(".") else ():
            with ExitStack() as lock, suppress(OSError):
                _lock(other, lock)
                _remove(other)

    def end(self) -> None:
        """Remove what is empty but for the copy."""
        self._locks.close()
        parents = {folder.parent for folder in self._made if folder.parent.name.startswith(".")}
        for folder in sorted({*self._made, *parents}, reverse=True):
            # A folder that is not empty is the user's, and stays.
            with suppress(OSError):
                _remove(folder)


def _lock(folder: Path, until: ExitStack) -> None:
    """Hold a folder's lock. Raises OSError: another process holds it, or it is no folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    until.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove(folder: Path) -> None:
    if {path.name for path in folder.iterdir()} <= {COPY}:
        (folder / COPY).unlink(missing_ok=True)
        folder.rmdir()
