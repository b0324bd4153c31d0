"""A small valid checkpoint of each format, made once by the tests' own builders: what mutations begin with."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

from tests import passes
from tests.loaders.layouts.test_packed import moe
from tests.making import write_moe
from tests.sources import SOURCES, Build, base


def _packed(source: Build) -> Build:
    return lambda root: (
        passes.run(source(root), root / "made", "mlx_int4", settings=["output=packed"])["mlx_int4"].folder
    )


def _moe(root: Path) -> Path:
    return write_moe(root / "moe")


BUILDERS: dict[str, Build] = {
    **{name.replace(" ", "_"): build for row in SOURCES.values() for name, build in row.items()},
    "moe": _moe,
    "packed": _packed(base),
    "packed_moe": _packed(lambda root: moe(root / "moe")),
}
_folder: Path | None = None


def use(folder: Path) -> None:
    """Keep seeds in this folder, where other processes may have made some."""
    global _folder
    _folder = folder


@cache
def seed(name: str) -> Path:
    """Return the folder of a seed, making it if it is not there."""
    folder = _folder if _folder is not None else Path(tempfile.mkdtemp())
    made = folder / name
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            shutil.copytree(BUILDERS[name](Path(work)), Path(work, "whole"))
            Path(work, "whole").rename(made)
    return made
