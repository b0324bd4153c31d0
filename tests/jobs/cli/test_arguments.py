"""Paths as arguments, whatever is in their names; and that our own names need no care."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.arguments import bare_value
from jobs.plan import PlanSpec
from jobs.run import VERB as RUN
from jobs.verify import VerifyRequest
from tests.making import make_source

NAMES = [
    "a=b", "a,b", " ab ", "it's", 'say "x"', "[x]", "{x}", "(x)", "$x", "${x}", r"a\b", r"a\${x}", "#x", "x:y", "a%20b",
    "a@b", "true", "1e5", "???", "a*b", "weights.bin",
]  # fmt: skip
WORSE = ["a=[b], 'c' \"ü\"", "[a,b]", "{a: b}", "'q'", "a${x}b", "null", "quant.group_size=64", "~x"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output."""
    from jobs.cli.main import main

    folder = tmp_path_factory.mktemp("made")
    source = make_source(folder / "source")
    assert main(["run", f"model.path={source}", f"output.path={folder / 'out'}", "tracking=none"]) == 0
    return folder / "out"


@pytest.mark.parametrize("name", NAMES)
def test_a_path_may_have_any_name(name: str, made: Path, weightmill: Any) -> None:
    Path(name).symlink_to(made)
    assert weightmill("inspect", name, "format=json").document["path"] == str(Path.cwd() / name)
    assert weightmill("plan", name, "quant=none").status == 0


@pytest.mark.parametrize("name", WORSE)
def test_every_verb_takes_a_path_of_any_name(name: str, made: Path, weightmill: Any) -> None:
    shutil.copytree(made, name)
    where = str(Path.cwd() / name)
    for verb, *others in (("lint",), ("inspect",), ("verify",), ("recommend",), ("diff", made)):
        ran = weightmill(verb, name, *others, "format=json")
        assert ran.status in (0, 1) if verb == "recommend" else ran.status == 0, (verb, ran.err)
        assert where in ran.out.replace("\\\\", "\\").replace('\\"', '"')
    ran = weightmill("compare", name, made, "format=json")
    assert ran.status == 0, ran.err
    assert {job["output"] for job in ran.document["runs"]} == {where, str(made)}
    assert weightmill("clean", name).status == 0
    bare = f"./{name}" if name.startswith("quant.") else name  # which is a setting of these
    assert weightmill("plan", bare, "quant=none", "format=json").document["source"]["path"] == where
    for number, typed in enumerate([bare] if name in ("null", "???", "~x") else [bare, f"model.path={name}"]):
        ran = weightmill("run", typed, "quant=none", f"output.path=out{number}", "format=json")
        assert ran.status == 0, ran.err
        assert ran.document["source"]["path"] == where
    ran = weightmill("run", "-m", bare, "quant=none", "quant.dtype=float32,bfloat16", "format=json")
    assert ran.status == 0, ran.err
    for job in ran.document["jobs"]:
        assert re.fullmatch(r"[\w.\-]+", Path(job["output"]).name)


def test_a_place_that_is_not_there_yet_may_have_any_name(made: Path, weightmill: Any) -> None:
    for name in ("[x]", "{a: b}", "it's = 1, 2", '"q', "(x)", "ü"):
        ran = weightmill("run", f"model.path={made}", "quant=none", f"output.path={name}")
        assert ran.status == 0, ran.err
        assert (Path.cwd() / name / "weightmill.json").exists()


def test_a_setting_is_one_even_if_a_folder_has_its_name(weightmill: Any) -> None:
    for name in ("quant=nf4", "verify=strict", "tensors=all", "made"):
        Path(name).mkdir()
    assert bare_value("quant=nf4", "run", PlanSpec, only_paths=True) is None
    assert bare_value("./quant=nf4", "run", PlanSpec) == str(Path.cwd() / "quant=nf4")
    assert bare_value("verify=strict", "verify", VerifyRequest) == str(Path.cwd() / "verify=strict")
    assert bare_value("verify=logits", "verify", VerifyRequest) is None
    assert bare_value("OWNER/NAME", "verify", VerifyRequest) == "OWNER/NAME"
    assert bare_value("nf4", "run", PlanSpec, only_paths=True) is None
    assert bare_value("made", "run", PlanSpec, only_paths=True) == str(Path.cwd() / "made")
    assert bare_value("-m", "run", PlanSpec) is None


def test_a_name_alone_is_no_path_of_a_job(weightmill: Any) -> None:
    ran = weightmill("run", "quat")
    assert ran.status == 2
    assert "quat: expected key=value; is it 'quant=...'?" in ran.err
    assert RUN.positional == ("model.path",)


@pytest.mark.parametrize("form", ["model.path={}", "{}"])
def test_outputs_of_a_sweep_can_be_given_back_to_every_verb(form: str, made: Path, weightmill: Any) -> None:
    given = ("quant=nf4,fp4", "quant.group_size=64,128", "quant.double_quant=true,false")
    swept = weightmill("run", "-m", form.format(made), *given, "verify.max_relative_error=0.5,0.6", "format=json")
    assert swept.status == 0, swept.err
    outputs = [job["output"] for job in swept.document["jobs"]]
    assert sorted({Path(out).name for out in outputs})[:2] == [
        "out-fp4-g128-dq-max_relative_error-0.5",
        "out-fp4-g128-dq-max_relative_error-0.6",
    ]
    assert len(set(outputs)) == 16
    for out in outputs[:2]:
        name = str(Path(out).relative_to(Path.cwd()))
        for verb in ("verify", "lint", "inspect"):
            assert weightmill(verb, name).status == 0
    assert weightmill("compare", *outputs).status == 0


def test_what_is_compared_must_be_an_output(made: Path, weightmill: Any) -> None:
    Path("folder").mkdir()
    for name, said in (("folder", "expected an output of weightmill at"), ("nothing", "no output at nothing")):
        ran = weightmill("compare", made, name)
        assert ran.status == 2
        assert f"runs: {said}" in ran.err
