"""What a reader is given: files that lie over a valid seed, and words on how they are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.seeds import seed


@dataclass(frozen=True)
class Case:
    """One input. `files` replace or join those of the seed; `words` say how it is read, or are a command line."""

    seed: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """A kind of input: how it is built, and how it is read. `read` gets the folder with the files, and the words."""

    cases: st.SearchStrategy[Case]
    read: Callable[[Path, tuple[str, ...]], None]
    examples: int = 60  # in the suite


class Bench:
    """A folder for each seed, over which one case after another is laid."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._laid: list[tuple[Path, bytes | None]] = []

    def lay(self, case: Case) -> Path:
        """Take the last case's files away, lay this case's, and return the folder."""
        for path, before in reversed(self._laid):
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)
        self._laid.clear()
        folder = self._folder / (case.seed or "none")
        if not folder.exists():
            if case.seed:
                shutil.copytree(seed(case.seed), folder)
            else:
                folder.mkdir(parents=True)
        for name, data in case.files.items():
            path = folder / name
            self._laid.append((path, path.read_bytes() if path.exists() else None))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder
