"""The command `weightmill`: its verbs, completion in a shell, a reader that leaves early."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.main import completions
from jobs.cli.program import program
from loaders.places import ROOT


@pytest.mark.quick
def test_the_shell_completes_verbs_groups_choices_and_settings() -> None:
    assert completions("weightmill in") == ["inspect"]
    assert "quant=" in completions("weightmill run qu")
    assert completions("weightmill run quant=n") == ["quant=nf4", "quant=none", "quant=nvfp4a16"]
    assert completions("weightmill run quant=nf4,fp4") == ["quant=nf4,fp4"]
    assert "quant.group_size=" in completions("weightmill run model=demo quant.g")
    assert completions("weightmill nonsense x") == []


def test_an_unknown_verb_and_option_are_refused(weightmill: Any) -> None:
    assert weightmill("quantise").status == 2
    ran = weightmill("run", "--force")
    assert ran.status == 2
    assert "--force: unknown option" in ran.err


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("weightmill  ru", ["run"]),
        ("weightmill run quant=nf4 quant.do", ["quant.double_quant="]),
        ("weightmill run quant.double_quant=t", ["quant.double_quant=true"]),
        ("weightmill run format=", ["format=text", "format=json"]),
        ("weightmill completion ", ["bash", "zsh"]),
        ("weightmill run quant=nf4,in", ["quant=nf4,int8"]),
    ],
)
def test_completion(line: str, wanted: list[str]) -> None:
    assert completions(line) == wanted


def test_completion_in_bash() -> None:
    """The script itself: the word under the cursor, not the line, decides what is cut at an equals sign."""
    from jobs.cli.main import SCRIPT, SHELLS

    script = SCRIPT.format(load=SHELLS["bash"]) + (
        f'weightmill() {{ "{sys.executable}" -m jobs.cli.main "$@"; }}\n'
        'for COMP_LINE in "weightmill run quant=nf4 quant.do" "weightmill run quant=in"; do\n'
        "COMP_POINT=${#COMP_LINE}; _weightmill; echo ${COMPREPLY[@]}; done\n"
    )
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["quant.double_quant=", "int8"]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f'"{sys.executable}" -m jobs.cli.main run --help | head -n 1'
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Traceback" not in ran.stderr


def test_a_folder_with_packages_of_the_same_names_runs_none_of_them(tmp_path: Path) -> None:
    """`python -m jobs.run` would: it begins in the current folder."""
    for name in ("jobs", "loaders", "conf", "weightmill", "hydra_plugins"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a package of the folder was imported')\n")
    script = tmp_path / "bin" / "weightmill"
    script.parent.mkdir()
    # What pip makes of [project.scripts], which puts its own folder first, and never the current one.
    script.write_text("from jobs.cli.main import script\n\nscript()\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments in (["run", "tracking=none", "cluster=local", "quant=nf4", "output.path=OUT"], ["lint", "OUT"]):
        ran = subprocess.run(
            [sys.executable, str(script), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
    asked = subprocess.run(
        [sys.executable, str(script), "plan", "check=engine"], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "a package of the folder" not in asked.stdout + asked.stderr
    assert asked.returncode == 0, asked.stderr


@pytest.mark.quick
def test_what_is_shown_begins_as_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = {name: tmp_path / name / "weightmill" for name in ("an environment", "another")}
    for script in scripts.values():
        script.parent.mkdir()
        script.touch(mode=0o755)
    mine, other = scripts.values()
    for path, wanted in ((mine, "weightmill"), (other, f"'{mine}'"), (tmp_path, f"'{mine}'")):
        monkeypatch.setattr(sys, "argv", [str(mine), "run"])
        monkeypatch.setenv("PATH", str(path.parent if path != tmp_path else path))
        assert program() == wanted
    monkeypatch.setattr(sys, "argv", ["jobs/run.py"])
    assert program() == "weightmill"
