"""The folder of outputs that earlier versions made, ./weightmill, which is ./outputs now.

It is known by what is in it, since a package of that name (a clone of this repository has one) is no folder of outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jobs.cli.verb import note
from jobs.spec.base import OUTPUTS
from loaders.storage.base import OUR_REPORT

FORMER = "weightmill"
STORE = "mlflow.db"
JOURNALS = ".*.weightmill"  # hidden folders beside outputs: those of interrupted jobs


def former_root(root: Path) -> Path | None:
    """Return the folder that held outputs before `root` was their default; None if there is none, or for another root.

    The user hears of it, once in a process.
    """
    former = root.parent / FORMER
    if root != Path.cwd() / OUTPUTS or not former.is_dir() or (root.exists() and former.samefile(root)):
        return None
    found = _found_in(former)
    if found is not None:
        _say(former, found)
    return None if found is None else former


def tracking_root(root: Path) -> Path:
    """Return the folder whose mlflow.db has the runs of jobs with a root: the former, while it alone has one."""
    if (root / STORE).exists():
        return root
    former = former_root(root)
    return former if former is not None and (former / STORE).exists() else root


def _found_in(folder: Path) -> str | None:
    """Return what shows that a folder is one of outputs."""
    patterns = (STORE, f"*/{OUR_REPORT}", JOURNALS)
    return next((str(found.relative_to(folder)) for each in patterns for found in folder.glob(each)), None)


@cache
def _say(former: Path, found: str) -> None:
    # Runs name the places of their files in full, so that a moved store finds them by a link alone.
    note(
        f"{former} holds outputs of earlier versions ({found}), and is looked into; outputs go to ./{OUTPUTS} now:"
        f" output.root={FORMER} keeps them together there, `mv {FORMER} {OUTPUTS} && ln -s {OUTPUTS} {FORMER}` moves"
        f" them, if there is no ./{OUTPUTS} yet"
    )
