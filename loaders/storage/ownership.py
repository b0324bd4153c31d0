"""Folders at places that others can foresee and may write: ours are real folders, and belong to this user.

Where a journal or scratch lies follows from a job, so somebody else could have made a folder there, with links in it
through which a job would write, publish or remove other files.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from loaders.errors import BadSpec, io_errors


def make_own(folder: Path, within: Sequence[str] = ()) -> None:
    """Make a folder and folders in it, unless they are there.

    Raises:
        BadSpec: one of them is a link, no folder, another user's, or others may write to it.
        StorageError: it cannot be made.
    """
    with io_errors("making", folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None
        # With this right nobody else reaches what is in it, whatever rights that has.
        _make(folder, 0o700)
        _check(folder)
        _check_rights(folder)
        for name in within:
            _make(folder / name, 0o777)
            _check(folder / name)


def check_planted(folder: Path) -> None:
    """Check that all within a folder of ours is files and folders, through none of which another place is written.

    Raises:
        BadSpec: there is something else, such as a link.
        StorageError: it cannot be read.
    """
    with io_errors("looking into", folder), os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            check_planted(Path(entry.path))
        elif not entry.is_file(follow_symlinks=False):
            raise BadSpec(
                f"{entry.path}: neither a file nor a folder, where weightmill makes nothing else; what is in"
                f" {folder} is not trusted: remove it, or choose another path"
            )


def _make(folder: Path, mode: int) -> None:
    # Whatever is there already is looked at next; here a link to nothing would raise an error that says less.
    with suppress(FileExistsError):
        folder.mkdir(mode)


def _check(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise BadSpec(f"{folder}: a link or a file, where weightmill makes a folder; remove it, or choose another path")
    # Some filesystems write down other users than those who write: what is made there now tells.
    if found.st_uid != os.geteuid() and found.st_uid != _made_in(folder.parent).st_uid:
        raise BadSpec(
            f"{folder}: made by the user {found.st_uid}, this is {os.geteuid()}; what is in it is not trusted:"
            " remove it, or choose another path"
        )


def _check_rights(folder: Path) -> None:
    others = folder.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    # Some filesystems have the same rights for everything.
    if others and others & ~_made_in(folder.parent).st_mode:
        raise BadSpec(
            f"{folder}: others may write to it; what is in it is not trusted: remove it, or choose another path"
        )


def _made_in(folder: Path) -> os.stat_result:
    """Return the status of a folder that this process makes in another for itself alone."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".weightmill-") as made:
        return os.stat(made)  # noqa: PTH116
