"""What programs of others are written against: names, signatures, docstrings, types; and how fast it is imported."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import loaders
import weightmill
from loaders.places import ROOT
from tests.test_readme import blocks
from tests.weightmill.public_names import GOLDEN, lines

IMPORTED_S = 0.1
HEAVY = {"numpy", "torch", "numba", "llvmlite", "ray", "mlflow", "hydra", "pydantic", "rich", "transformers"}


@pytest.mark.quick
def test_names_and_signatures_are_those_that_were_published() -> None:
    said = "a change for users: see Public names in CONTRIBUTING.md, and python -m tests.weightmill.public_names"
    assert lines() == GOLDEN.read_text().splitlines(), said


@pytest.mark.quick
def test_every_name_says_what_it_is() -> None:
    for name in set(weightmill.__all__) - {"__version__"}:
        value = getattr(weightmill, name)
        own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        assert own, name
        # A dataclass without a docstring gets its signature for one.
        assert not own.startswith(f"{name}("), name


def test_the_library_s_names_are_all_there_and_are_the_same() -> None:
    assert set(loaders.__all__) < set(weightmill.__all__) <= set(dir(weightmill))
    assert weightmill.load_weights is loaders.load_weights
    with pytest.raises(AttributeError, match="module 'weightmill' has no attribute 'lode_weights'"):
        _ = weightmill.lode_weights  # type: ignore[attr-defined]
    with pytest.raises(
        AttributeError, match=r"'recommend'; get_recommended_loader_config recommends .* lint, list_outputs, plan, run"
    ):
        _ = weightmill.recommend  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="'diff'; it is a command: `weightmill diff`"):
        _ = weightmill.diff  # type: ignore[attr-defined]


def test_the_import_takes_no_time_and_brings_nothing_along(tmp_path: Path) -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import weightmill; took = time.perf_counter() - began;"
        "print(took, *sys.modules)"
    )
    took = []
    for _ in range(3):  # the first may find no compiled files
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        seconds, *modules = ran.stdout.split()
        took.append(float(seconds))
        assert not HEAVY & {*modules}
    assert min(took) <= IMPORTED_S


PROGRAM = """
    from pathlib import Path

    import weightmill
    from weightmill import Progress, QuantizedTensor, load_weights, quantize, run

    def told(progress: Progress) -> None:
        print(f"{progress.fraction:.0%}", progress.last)

    result = run({"quant.group_size": 128}, model="demo", quant="nf4", output=Path("out"), progress=told)
    ratio: float = result.report.totals.ratio
    reveal_type(run({"quant": {"name": "nf4", "group_size": 64}}, output="OUT").output)
    reveal_type(run(quant=["nf4", "fp4"]).jobs)
    reveal_type(run({"unit_mb": [1, 2]}))
    reveal_type(run(experiment="bits4"))
    plan: weightmill.JobPlan = weightmill.plan(model="demo")
    bits: float = plan.bits_per_weight
    weights, statistics = load_weights("out", quantize="nf4")
    tensor: object = weights["a"]
    reveal_type(quantize(tensor))
    reveal_type(quantize({"a": weights["a"]}))
    part = quantize(tensor).to("cpu").by_role()["weight"]
    try:
        weightmill.verify("out").raise_for_faults()
    except weightmill.WeightmillError as error:
        where: str | None = error.where
    weightmill.verfy("out")
    run(quant=4)
"""
SAID = [
    '"str"',
    "JobResult]",
    "JobResult |",
    "JobResult |",
    "QuantizedTensor",
    "QuantizedWeights",
    '"verfy"',
    "No overload variant of",
]
# What is not asked about here, and takes a checker most of its time to read.
SETTINGS = """
    [mypy]
    strict = true
    follow_imports = silent
    [mypy-torch.*,numpy.*,pydantic.*,rich.*]
    follow_imports = skip
"""


@pytest.mark.slow
def test_a_checker_sees_the_types_of_a_user_s_program(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    section = (ROOT / "README.md").read_text().partition("### As a library\n")[2].partition("\n### ")[0]
    for number, (_, code) in enumerate(blocks(section)):
        (tmp_path / f"readme{number}.py").write_text(code)
    (tmp_path / "mypy.ini").write_text(textwrap.dedent(SETTINGS))
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", *sorted(path.name for path in tmp_path.glob("*.py"))], cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in ran.stdout.splitlines() if line.startswith(("program.py", "readme"))]
    said = [line for line in said if "error:" in line or "Revealed type" in line]  # not what overloads there are
    said = [line.replace("builtins.", "") for line in said]  # as older versions write them
    assert len(said) == len(SAID), ran.stdout
    for line, wanted in zip(said, SAID, strict=True):
        assert wanted in line
