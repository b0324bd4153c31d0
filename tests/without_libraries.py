"""Commands of weightmill in a process in which only the libraries of the base install can be imported.

python -m tests.without_libraries: standard input has a list of commands in JSON, each a list of words; words such as
NAME=VALUE that come first are its environment. Standard output gets, for each, its exit status and what it printed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from itertools import takewhile
from typing import Any

from packaging.requirements import Requirement

from loaders.places import ROOT

NAMED = re.compile(r"[A-Z_]+=")


def base_distributions() -> set[str]:
    """Return the names of what `pip install weightmill` brings: the dependencies of pyproject.toml, and theirs."""
    left = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = set[str]()
    while left:
        needed = Requirement(left.pop())
        name = plain(needed.name)
        if name in found or (needed.marker is not None and not needed.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        left += metadata.requires(name) or []
    return found


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def optional_modules() -> set[str]:
    """Return the modules of this environment that are of other distributions; `tests` needs `packaging` itself."""
    base, ours = base_distributions(), {"weightmill", "packaging"}
    made_by = metadata.packages_distributions()
    return {module for module, by in made_by.items() if not {plain(each) for each in by} & (base | ours)}


class Hidden(PathFinder):
    """Python's finder of modules, to which some are not installed."""

    modules: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in cls.modules else super().find_spec(fullname, path, target)


def hide(modules: set[str]) -> None:
    """Make modules not importable in this process. Those that are imported already are forgotten."""
    Hidden.modules = frozenset(modules)
    sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden
    for name in [each for each in sys.modules if each.partition(".")[0] in modules]:
        del sys.modules[name]


def ran(commands: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    from jobs.cli.main import main

    for words in commands:
        named = dict(word.split("=", 1) for word in takewhile(NAMED.match, words))
        os.environ.update(named)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(words[len(named) :])
        for name in named:
            del os.environ[name]
        yield {"status": status, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    hide(optional_modules())
    json.dump(list(ran(json.load(sys.stdin))), sys.stdout)
