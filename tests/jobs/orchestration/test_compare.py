"""Comparing runs: which crashed, and what is said of those that are whole."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.tracking.mlflow_run import HEARTBEAT, HOST, PID
from jobs.tracking.sweep_tag import SWEEP

pytestmark = pytest.mark.filterwarnings("ignore")


def test_crashed_failed_and_running_runs_are_told_apart(source: Path, tmp_path: Path, weightmill: Any) -> None:
    from mlflow.tracking import MlflowClient

    root = tmp_path / "o"
    ran = weightmill("run", "-m", f"model.path={source}", f"output.root={root}", "tracking=mlflow",
                     "quant=nf4,mlx_int4", "verify.max_relative_error=null,0.001")  # fmt: skip
    assert ran.status == 1
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    [experiment] = [e.experiment_id for e in client.search_experiments() if e.name == "weightmill"]
    [sweep] = {run.data.tags["weightmill.sweep"] for run in client.search_runs([experiment])}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name, pid in (("gone", gone.pid), ("going", os.getpid())):
        tags = {HOST: socket.gethostname(), PID: str(pid), SWEEP: sweep, HEARTBEAT: str(int(time.time()))}
        client.create_run(experiment, run_name=name, tags=tags)
    found = weightmill("compare", f"output.root={root}", "format=json")
    assert found.status == 0, found.err
    assert found.document["title"] == sweep
    statuses = {run["name"]: run["status"] for run in found.document["runs"]}
    assert (statuses["gone"], statuses["going"]) == ("crashed", "running")
    assert sorted(statuses.values()) == ["crashed", "done", "done", "failed", "failed", "running"]
    assert all(run["error_by_layer"] for run in found.document["runs"] if run["status"] == "done")
    assert found.document["differing"]
    assert all(Path(file).is_file() for file in found.document["files"])
    filtered = weightmill("compare", f"output.root={root}", "filter=metrics.`size/bits_per_weight` < 5", "format=json")
    assert {run["status"] for run in filtered.document["runs"]} == {"done"}
    folders = [run["output"] for run in found.document["runs"] if run["status"] == "done"]
    untracked = weightmill("compare", f"runs=[{','.join(repr(f) for f in folders)}]", f"output.root={tmp_path / 'n'}")
    assert untracked.status == 0, untracked.err
    assert "Pareto front" in untracked.out


def test_what_is_not_there_is_refused(tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill("compare", f"output.root={tmp_path / 'none'}")
    assert ran.status == 2
    assert "tracking.uri: no " in ran.err


def test_a_sweep_over_two_models_gives_each_a_table_and_a_front(source: Path, tmp_path: Path, weightmill: Any) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    root = tmp_path / "o"
    ran = weightmill("run", "-m", f"model.path={source},{other}", f"output.root={root}", "tracking=mlflow",
                     "quant=nf4,mlx_int8", "format=json")  # fmt: skip
    assert ran.status == 0, ran.err
    models = {model["source"]: len(model["pareto"]) for model in ran.document["models"]}
    assert models == {str(source): 2, str(other): 2}
    folders = [job["output"] for job in ran.document["jobs"]]
    for given in ((), (f"runs=[{','.join(map(repr, folders))}]",)):
        found = weightmill("compare", f"output.root={root}", *given)
        assert found.status == 0, found.err
        assert "4 runs of 2 models, compared each by itself" in found.out
        assert f"{other}: 2 jobs" in found.out
        assert f"{source}: 2 jobs" in found.out
        assert found.out.count("Pareto front (*) of bits per weight against relative error of the weights") == 2


def test_outputs_are_compared_from_anywhere_without_a_store_of_runs(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "o"
    ran = weightmill("run", "-m", f"model.path={source}", f"output.root={root}", "tracking=none", "quant=nf4,fp4,int8")
    assert ran.status == 0, ran.err
    [line] = [line for line in ran.out.splitlines() if line.startswith("compare them: ")]
    verb, *outputs = shlex.split(line)[3:]
    assert verb == "compare"
    assert len(outputs) == 3
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    for given in (outputs, outputs[:2], outputs[1:]):
        assert weightmill("compare", *given).status == 0
    names = {folder.name for folder in (elsewhere / "outputs" / "comparisons").iterdir()}
    nf4, fp4, int8 = (Path(output).name for output in outputs)
    assert names == {f"{nf4}-{fp4}-{int8}", f"{nf4}-{fp4}", f"{fp4}-{int8}"}
