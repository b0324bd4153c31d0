"""A test that README.md's Python runs: each ```python block, in order, in one namespace, with the demo checkpoint."""

from __future__ import annotations

import importlib
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import yaml

from jobs.cli.main import VERBS
from loaders.architectures.family_files import FOLDER
from loaders.places import CONF
from tests import written_types
from tests.readme import README, table_of

DEMO = README.parent / "jobs" / "demo"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[int, str]]:
    """Return the line at which each block begins, and its code."""
    return [(text.count("\n", 0, found.start(1)) + 1, found[1]) for found in BLOCK.finditer(text)]


def run_blocks(path: Path, folder: Path) -> int:
    """Run the blocks of a page and return their number; the demo is copied to `folder` / "demo"."""
    shutil.copytree(DEMO, folder / "demo", ignore=shutil.ignore_patterns("*.md"))
    namespace: dict[str, object] = {"__name__": "__main__"}
    found = blocks(path.read_text())
    for line, code in found:
        # With leading empty lines, tracebacks show the line of the page.
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
    return len(found)


@pytest.mark.quick
def test_every_verb_is_in_the_lists_of_verbs() -> None:
    text = README.read_text()
    programs = text[text.index("## For programs") : text.index("## How it is built")]
    rows = re.findall(r"^\| `(\w+)` ", programs, re.MULTILINE)
    assert sorted(rows) == sorted(VERBS), "the table of For programs"
    listed = re.search(r"A verb a file: ([\w, ]+)$", text, re.MULTILINE)
    assert listed is not None
    assert sorted(listed[1].split(", ")) == sorted(VERBS), "the line of jobs/ in How it is built"
    files = {path.stem for path in (README.parent / "jobs").glob("*.py")} - {"__init__", "__main__"}
    assert files == {*VERBS}, "VERBS of jobs/cli/main.py"
    for verb in VERBS:
        config = importlib.import_module(f"jobs.{verb}").VERB.config or verb
        assert (CONF / f"{config}.yaml").is_file(), f"the settings of {verb}"


@pytest.mark.quick
def test_the_model_types_that_are_written_are_listed() -> None:
    assert table_of("families") == written_types.table(), "python -m tests.readme writes it"


@pytest.mark.quick
def test_the_family_that_is_shown_is_the_family_that_there_is() -> None:
    contributing = (README.parent / "CONTRIBUTING.md").read_text()
    shown = re.search(r"  ```yaml\n(  # GLM-4.5.*?)  ```\n", contributing, re.DOTALL)
    assert shown is not None
    there = (FOLDER / "glm4_moe.yaml").read_text()
    assert yaml.safe_load(textwrap.dedent(shown[1])) == yaml.safe_load(there)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTMILL_CACHE", str(tmp_path / "cache"))
    wanted = README.read_text().count("```python")
    assert wanted > 0
    assert run_blocks(README, tmp_path) == wanted
