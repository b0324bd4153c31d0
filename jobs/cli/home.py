"""A home and a temporary folder for libraries that need them, where the user and the machine have none.

MLflow, Ray and matplotlib look for the user's folder while they are imported.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from loaders.storage.user_cache import can_be_made, temporary_folder


def have_home() -> None:
    """Give a process whose user has no home one in the temporary folder, for all libraries and child processes.

    A home that is only read stays, since it may hold configuration and credentials; matplotlib, which would complain
    at length of such a one, gets another folder.
    """
    try:
        home = Path.home()
    # There is no HOME, and the system has no entry for this user.
    except RuntimeError:
        home = Path()
    made = None
    if not (home.is_absolute() and home.is_dir()) and (made := temporary_folder()):
        os.environ["HOME"] = os.fspath(made)
    elif not can_be_made(home / ".config" / "matplotlib") and (made := temporary_folder()):
        os.environ.setdefault("MPLCONFIGDIR", os.fspath(made / "matplotlib"))


def have_temporary_folder(spec: BaseModel) -> None:
    """Put temporary files into the folder of outputs, where the machine has no other that can be written."""
    with suppress(FileNotFoundError):
        tempfile.gettempdir()
        return
    root = getattr(getattr(spec, "output", None), "local_root", None)
    if root is not None and can_be_made(root):
        with suppress(OSError):  # what is wrong with the folder of outputs is said when an output is made
            root.mkdir(parents=True, exist_ok=True)
            tempfile.tempdir = os.environ["TMPDIR"] = os.fspath(root)
            have_home()
