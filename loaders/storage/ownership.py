"""Folders at places that others can foresee and may write: ours are real folders, and belong to this user.

Where a journal or scratch lies follows from a job, so somebody else could have made a folder there, with links in it
through which a job would write, publish or remove other files.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loaders.errors import BadSpec, io_errors


def make_own(folder: Path, within: Sequence[str] = ()) -> None:
    """Make a folder and folders in it, unless they are there.

    Raises:
        BadSpec: one of them is a link, no folder, or another user's.
        StorageError: it cannot be made.
    """
    with io_errors("making", folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check(folder)
        for name in within:
            (folder / name).mkdir(exist_ok=True)
            _check(folder / name)


def _check(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise BadSpec(f"{folder}: a link or a file, where weightmill makes a folder; remove it, or choose another path")
    # Some filesystems write down other users than those who write: what is made there now tells.
    if found.st_uid != os.geteuid() and found.st_uid != _user_at(folder.parent):
        raise BadSpec(
            f"{folder}: made by the user {found.st_uid}, this is {os.geteuid()}; what is in it is not trusted:"
            " remove it, or choose another path"
        )


def _user_at(folder: Path) -> int:
    """Return whose a file is that this process makes in a folder."""
    with tempfile.TemporaryFile(dir=folder) as made:
        return os.fstat(made.fileno()).st_uid
