"""The base install: every verb works without an optional library; what needs one says so in a line, before the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.cli.main import VERBS
from loaders.missing import INSTALLED_BY
from loaders.places import DEMO, ROOT
from tests.without_libraries import base_distributions, optional_modules


def without(folder: Path, commands: Sequence[Sequence[Any]]) -> list[Any]:
    """Run commands where only the libraries of the base install are; returns their statuses and what they printed."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.without_libraries"], input=json.dumps([[*map(str, c)] for c in commands]),
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    return [SimpleNamespace(**each) for each in json.loads(told.stdout)]


def test_every_verb_works_in_the_base_install(tmp_path: Path) -> None:
    nf4, fp4 = (tmp_path / "made" / f"demo-{name}" for name in ("nf4", "fp4"))
    commands = {
        "run": ["run", "output.root=made"],
        "sweep": ["run", "-m", "quant=nf4,fp4", "output.root=made"],
        "plan": ["plan", "quant=w4a16"],
        "verify": ["verify", nf4],
        "lint": ["lint", nf4],
        "inspect": ["inspect", nf4],
        "diff": ["diff", nf4, nf4],
        "compare": ["compare", nf4, fp4, "output.root=made"],
        "recommend": ["recommend", DEMO],
        "bench": ["bench", "plan", "tensors=200", "quants=[nf4]"],
        "clean": ["clean", "output.root=made"],
        "status": ["status", nf4],
        "list": ["list", "made"],
        "track": ["track", nf4],
    }
    assert commands.keys() - {"sweep"} == {*VERBS}
    found = dict(zip(commands, without(tmp_path, list(commands.values())), strict=True))
    for verb, each in found.items():
        assert (verb, each.status) == (verb, 2 if verb == "track" else 0), each.err
        assert "Traceback" not in each.err
    untracked = (
        "not tracked: tracking=auto needs mlflow, sqlalchemy, alembic, which are not installed: pip install"
        " 'weightmill[mlflow]'; tracking=none leaves this line out"
    )
    for verb in ("run", "plan"):
        assert " ".join((found[verb].err + found[verb].out).split()).count(untracked) == 1
    assert found["sweep"].err.splitlines().count(untracked) == 1
    assert (nf4 / "report.html").read_text().count("<svg") > 0
    assert f"tracking=mlflow needs {MLFLOW}; {NONE}" in found["track"].err  # there is nothing else that it does
    drawing = "drawing compare.png needs matplotlib, which is not installed: pip install 'weightmill[plots]'"
    assert found["compare"].err.splitlines().count(drawing) == 1
    [folder] = (tmp_path / "made" / "comparisons").iterdir()
    assert {each.name for each in folder.iterdir()} == {"compare.md", "compare.json"}
    assert "compare.png" not in (folder / "compare.md").read_text() + (folder / "compare.json").read_text()


MLFLOW = "mlflow, sqlalchemy, alembic, which are not installed: pip install 'weightmill[mlflow]'"
NONE = "tracking=none runs without"
REFUSED = {
    ("run", "tracking=mlflow"): f"tracking=mlflow needs {MLFLOW}; {NONE}",
    ("plan", "tracking=mlflow"): f"tracking=mlflow needs {MLFLOW}; {NONE}",
    ("run", "tracking.register=a"): f"tracking.register needs {MLFLOW}; {NONE}",
    ("run", "tracking.uri=http://h:1"): (
        f"tracking.uri needs mlflow, which is not installed: pip install 'weightmill[mlflow]'; {NONE}"
    ),
    ("compare",): f"tracking.uri: reading MLflow needs {MLFLOW}; runs='[FOLDER,...]' compares outputs without",
    ("run", "cluster=ray"): (
        "cluster=ray needs ray, which is not installed: pip install 'weightmill[ray]'; cluster=local runs in this"
        " process"
    ),
    ("RAY_ADDRESS=h:1", "run"): (
        "cluster=auto with RAY_ADDRESS in the environment needs ray, which is not installed: pip install"
        " 'weightmill[ray]'; cluster=local runs in this process"
    ),
    ("MLFLOW_TRACKING_URI=http://h:1", "run"): (
        "tracking.uri, which the environment's MLFLOW_TRACKING_URI names, needs mlflow, which is not installed: pip"
        f" install 'weightmill[mlflow]'; {NONE}"
    ),
    ("run", "verify=logits"): (
        "verify=logits: running the original and the output needs torch, transformers, accelerate, bitsandbytes, which"
        " are not installed: pip install 'weightmill[models]' bitsandbytes; or verify=strict, which runs nothing"
    ),
    ("run", "quant=auto", "quant.engine=mlx", "quant.target_bits=4.25", "quant.calibration=self"): (
        "quant.calibration needs torch, transformers, which are not installed: pip install 'weightmill[models]'"
    ),
    ("run", "backend=cuda"): "backend=cuda needs torch, which is not installed: pip install 'weightmill[models]'",
    ("run", "backend=mlx", "quant=mlx_int4"): (
        "backend=mlx needs mlx, which is not installed: pip install mlx, on Linux 'mlx[cpu]'"
    ),
    ("inspect", "hf://a/b"): "hf:// needs huggingface_hub, which is not installed: pip install 'weightmill[hub]'",
    ("inspect", "s3://a/b"): "s3:// needs obstore, which is not installed: pip install 'weightmill[stores]'",
    ("run", "output.path=gs://a/b"): "gs:// needs obstore, which is not installed: pip install 'weightmill[stores]'",
    ("bench", "gpu"): (
        "device=cuda needs torch, which is not installed: pip install 'weightmill[models]'; parts=[cores] needs no GPU"
    ),
}  # fmt: skip


@pytest.mark.quick
def test_what_needs_a_library_says_so_in_one_line_before_the_work(tmp_path: Path) -> None:
    for (words, said), each in zip(REFUSED.items(), without(tmp_path, [*REFUSED]), strict=True):
        assert (words, each.err) == (words, f"weightmill: this cannot be done: {said}\n")
        assert (each.status, each.out) == (2, "")
    assert not [*tmp_path.rglob("weightmill.json")]


@pytest.mark.quick
def test_the_extras_that_messages_name_bring_the_libraries() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {"azure": "azure-storage-blob", "mlflow": "mlflow-skinny", "llama_cpp": "llama-cpp-python"}
    for library, command in INSTALLED_BY.items():
        if command.startswith("'weightmill["):
            wanted = packages.get(library, library.replace("_", "-"))
            brought = extras[command.removeprefix("'weightmill[").removesuffix("]'")]
            assert any(each.replace("_", "-").startswith(wanted) for each in brought), library


def test_the_base_install_has_none_of_them() -> None:
    assert not {"ray", "mlflow-skinny", "matplotlib", "sqlalchemy", "torch", "psutil"} & base_distributions()
    assert {"ray", "mlflow", "matplotlib", "sqlalchemy", "torch", "psutil", "PIL"} <= optional_modules()
