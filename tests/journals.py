"""The journals of interrupted jobs in a folder of outputs."""

from __future__ import annotations

from pathlib import Path

from jobs.output.journal import LOGITS
from jobs.output.leftovers import find_leftovers
from loaders.storage.address import Address


def find_journals(folder: Path) -> list[Path]:
    """Return the journal folders of unfinished outputs; finished jobs have removed theirs."""
    return [found.address.path for found in find_leftovers(Address.of(folder)) if found.address.name != LOGITS]
