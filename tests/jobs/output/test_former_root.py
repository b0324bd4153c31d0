"""./weightmill of earlier versions is found, and said once; a package of that name is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from jobs.output.former_root import former_root, tracking_root
from jobs.output.journal import Journal
from loaders.storage.address import Address


def test_runs_of_earlier_versions_are_compared_and_new_ones_tracked_beside_them(weightmill: Any) -> None:
    former = Path.cwd() / "weightmill"
    assert weightmill("run", f"output.root={former}", "tracking=mlflow", "cluster=local").status == 0
    ran = weightmill("run", "quant=fp4", "tracking=mlflow", "cluster=local")
    assert ran.status == 0, ran.err
    assert ran.err.count(f"{former} holds outputs of earlier versions (mlflow.db)") == 1
    assert "output.root=weightmill keeps them together there" in ran.err
    assert not (Path.cwd() / "outputs" / "mlflow.db").exists()
    compared = weightmill("compare", "sweep=all", "format=json")
    assert {run["name"] for run in compared.document["runs"]} == {"demo-nf4", "demo-fp4"}
    # Moved as the note says, they are found where they lie, with the tables that they logged.
    shutil.move(former, Path.cwd() / "outputs.new")
    shutil.rmtree(Path.cwd() / "outputs")
    shutil.move(Path.cwd() / "outputs.new", Path.cwd() / "outputs")
    former.symlink_to("outputs")
    assert former_root(Path.cwd() / "outputs") is None
    moved = weightmill("compare", "sweep=all", "format=json")
    assert len(moved.document["runs"]) == 2
    assert moved.document["differing"]


def test_clean_looks_there_too(weightmill: Any) -> None:
    left = Journal(Address.of(Path.cwd() / "weightmill" / "demo-nf4"), "a" * 12)
    with left.hold({}, overwrite=False):
        pass
    journal = left.destination.root
    assert [found["path"] for found in weightmill("clean", "format=json").document["found"]] == [str(journal)]
    assert weightmill("clean", "delete=true").status == 0
    assert not journal.exists()


def test_a_package_of_that_name_is_none(weightmill: Any, tmp_path: Path) -> None:
    root = Path.cwd() / "outputs"
    package = Path.cwd() / "weightmill"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mlflow").mkdir()
    assert former_root(root) is None
    (package / "demo-nf4").mkdir()
    (package / "demo-nf4" / "weightmill.json").touch()
    assert former_root(root) == package
    assert former_root(tmp_path / "elsewhere") is None
    assert tracking_root(root) == root, "it has no store"
