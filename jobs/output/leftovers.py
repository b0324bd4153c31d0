"""What interrupted jobs left beside their outputs, and the originals' logits that verify=logits keeps."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.output.journal import LOGITS, find_journals, is_held
from loaders.errors import io_errors


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A folder that only an interrupted job, or a later judging, has a use for."""

    path: Path
    size: int  # bytes of its files
    units_done: int
    age_s: float  # since one of its files changed
    is_held: bool  # a process works on it

    @property
    def is_cache(self) -> bool:
        """Whether it is kept on purpose, rather than left behind."""
        return self.path.name == LOGITS

    def document(self, *, will_remove: bool) -> dict[str, Any]:
        """For machines; `status` is what became of it, or would be kept."""
        left = "removed" if will_remove else "kept" if self.is_cache else "abandoned"
        return {
            "path": str(self.path),
            "bytes": self.size,
            "units_done": self.units_done,
            "age_s": self.age_s,
            "status": "in use" if self.is_held else left,
        }


def find_leftovers(folder: Path, output: str | None = None) -> tuple[Leftover, ...]:
    """Those in a folder of outputs, or of one output in it."""
    paths = find_journals(folder, output)
    if output is None and (folder / LOGITS).is_dir():
        paths.append(folder / LOGITS)
    return tuple(_leftover(path) for path in paths)


def _leftover(path: Path) -> Leftover:
    files = [p for p in path.rglob("*") if p.is_file()]
    return Leftover(
        path=path,
        size=sum(p.stat().st_size for p in files),
        units_done=sum(p.parent.name == "records" for p in files),
        age_s=time.time() - max((p.stat().st_mtime for p in files), default=path.stat().st_mtime),
        is_held=is_held(path),
    )


def remove(found: Sequence[Leftover]) -> None:
    """Remove those that no process works on.

    Raises:
        StorageError: one cannot be removed.
    """
    for leftover in found:
        if not leftover.is_held:
            with io_errors("removing", leftover.path):
                shutil.rmtree(leftover.path)
