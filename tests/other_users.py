"""Commands of this checkout as another user, on a machine of which little may be written."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from loaders.places import ROOT

NOBODY = 54321  # a user id without a name
# This checkout and its interpreter may lie in folders of root's: they may be read, and nothing more.
READS = "dac_read_search"


@cache
def _can_change_users() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("setpriv") or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


def becoming(*, reads: bool = True) -> list[str]:
    """Return the command that runs one as a user without a name or rights; with `reads` it may read everything."""
    if not _can_change_users():
        pytest.skip("needs root, setpriv and unshare, to become another user")
    may = f"-all,+{READS}" if reads else "-all"
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", f"--inh-caps={may}"]
    return [*words, f"--bounding-set={may}", *([f"--ambient-caps={may}"] if reads else [])]


def as_nobody(
    *arguments: str | Path,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    mounts: str = "",
    reads: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` as a user without a name, a home or rights, in mounts of its own.

    `mounts` are commands of a shell that change them first, as root. With `reads` the user may read everything.
    """
    command = shlex.join([*becoming(reads=reads), sys.executable, *map(str, arguments)])
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f"mount --make-rprivate /; {mounts or ':'} && exec {command}"],
        cwd=cwd, env=given, capture_output=True, text=True, check=False,
    )  # fmt: skip
