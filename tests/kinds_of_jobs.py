"""Jobs of every kind of output, for what is done to them: kills, flips, system calls that fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.storage.base import OUR_REPORT
from tests.forks import Forks
from tests.jobs.test_over_stores import comparable
from tests.loaders.layouts.test_packed import moe
from tests.making import make_source, snapshot

USUAL = ("unit_mb=0.02", "tracking=none", "cluster=local")


@dataclass(frozen=True)
class Kind:
    """A job, by its settings. A sweep makes several outputs."""

    settings: tuple[str, ...]
    source: Callable[[Path], Path] = make_source

    @property
    def is_sweep(self) -> bool:
        return "-m" in self.settings

    def arguments(self, source: Path, folder: Path) -> list[str]:
        """Return the command that makes the outputs in a folder."""
        where = f"output.root={folder}" if self.is_sweep else f"output.path={folder / 'out'}"
        return ["run", *self.settings, f"model.path={source}", where, *USUAL]


KINDS = {
    "nf4": Kind(("quant=nf4", "quant.double_quant=true")),
    "gguf": Kind(("quant=gguf_q8_0",)),
    "bin": Kind(("quant=none", "output.container=pytorch")),
    "packed": Kind(("quant=mlx_int4", "output=packed"), moe),
    "qmodel": Kind(("quant=hqq4",)),
    "auto": Kind(("quant=auto", "quant.engine=mlx", "quant.among=[mlx_int2,mlx_int4,mlx_int8]", "quant.target_bits=5")),
    "sweep": Kind(("-m", "quant=nf4,mlx_int4,hqq4")),
}
Outputs = Mapping[str, tuple[dict[str, bytes], Any]]


def outputs(folder: Path) -> Outputs:
    """Return what is visible of outputs in a folder: files, and the report without times and places."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.is_dir() and not path.name.startswith("."):
            files = snapshot(path)
            found[path.name] = comparable(files) if OUR_REPORT in files else (files, None)
    return found


def hidden(folder: Path) -> list[Path]:
    """Return what is left beside the outputs."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(".")) if folder.exists() else []


def records(folder: Path) -> dict[str, bytes]:
    """Return the records of finished units, by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(".*/records/*.json")}


def made(work: Path, kind: str, forks: Forks) -> tuple[Path, Outputs, int]:
    """Make a kind's source, and its outputs undisturbed; returns both, and the changes to the disk that it took."""
    source = KINDS[kind].source(work / kind / "source")
    ran = forks.run(*KINDS[kind].arguments(source, work / kind / "wanted"))
    assert ran.status == 0, ran.err
    return source, outputs(work / kind / "wanted"), ran.changes


def as_json(data: bytes) -> Any:
    """A document, or None if it is none."""
    try:
        return json.loads(data)
    except ValueError:
        return None
