"""MLflow: one run a job, what it holds, and what it says of jobs that did not end well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.making import write_checkpoint
from tests.processes import start

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store; making one takes seconds."""
    from jobs.spec.tracking import TrackingSpec
    from jobs.tracking.run import open_run

    root = tmp_path_factory.mktemp("store")
    open_run(TrackingSpec(kind="mlflow"), root, "first", {}, {}, "key").close("FINISHED")
    return root


def runs(root: Path) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("weightmill")
    assert experiment is not None
    return [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name != "first"]


def run(store: Path, weightmill: Any, source: Path, out: Path, *extra: str) -> tuple[Any, Any]:
    ran = weightmill(
        "run", f"model.path={source}", f"output.path={out}", f"output.root={store}", "tracking=mlflow", *extra
    )
    [found] = [r for r in runs(store) if r.info.run_name == out.name]
    return ran, found


@pytest.mark.quick
def test_a_run_holds_everything(store: Path, source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran, found = run(store, weightmill, source, tmp_path / "whole", "format=json", "unit_mb=0.05")
    assert ran.status == 0, ran.err
    assert found.info.status == "FINISHED"
    assert found.info.run_id in ran.document["tracked"]
    total = ran.document["totals"]
    metrics = found.data.metrics
    assert metrics["size/bits_per_weight"] == pytest.approx(total["bits_per_weight"])
    assert metrics["error/relative"] == pytest.approx(total["relative_error"])
    assert metrics["error/relative_changed"] == pytest.approx(total["changed"]["relative_error"])
    assert metrics["units/total"] == ran.document["run"]["units"]
    for name in ("time/wall_s", "time/read_s", "time/encode_s", "time/measure_s", "time/write_s",
                 "load/gigabytes_per_second", "load/peak_anonymous_bytes", "units/retries", "error/worst"):  # fmt: skip
        assert name in metrics
    assert found.data.params["quant.group_size"] == "64"
    assert found.data.params["model.path"] == str(source)
    assert found.data.tags["weightmill.source"] == ran.document["source"]["fingerprint"]
    assert "weightmill.git_commit" in found.data.tags
    assert "weightmill.version.numba" in found.data.tags
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    assert [(m.step, m.value > 0) for m in client.get_metric_history(found.info.run_id, "layer/relative_error")] == [
        (0, True),
        (1, True),
    ]
    names = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert names == {"tensors.json", "plan.json", "weightmill.json", "error_by_layer.png", "size.png"}
    table = json.loads(Path(client.download_artifacts(found.info.run_id, "tensors.json", str(tmp_path))).read_text())
    assert len(table["data"]) == 21


def test_a_job_that_fails_says_so(store: Path, source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran, found = run(store, weightmill, source, tmp_path / "failed", "verify.max_relative_error=0.001")
    assert ran.status == 1
    assert found.info.status == "FAILED"


def test_a_job_that_is_stopped_says_so_and_its_run_goes_on_when_it_does(
    store: Path, source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jobs.orchestration.job.complete", no)
        ran, killed = run(store, weightmill, source, tmp_path / "stopped")
    assert ran.status == 130
    assert killed.info.status == "KILLED"
    ran, found = run(store, weightmill, source, tmp_path / "stopped")
    assert ran.status == 0
    assert (found.info.run_id, found.info.status) == (killed.info.run_id, "FINISHED")


def test_a_store_that_cannot_be_used_stops_the_job(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = weightmill(
        "run",
        f"model.path={source}",
        f"output.path={tmp_path / 'out'}",
        "tracking=mlflow",
        "tracking.uri=sqlite:////proc/none/x.db",
    )
    assert ran.status == 1
    assert "tracking" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.slow
def test_processes_that_make_one_store_at_once_do_not_break_it(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    given = ("-m", "jobs.run", f"model.path={source}", f"output.root={tmp_path / 'root'}")
    processes = [start(*given, f"output.path={tmp_path / f'out{i}'}") for i in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    assert sorted(r.info.status for r in runs(tmp_path / "root")) == ["FINISHED"] * 2


def test_pages_of_mlflow_are_addressed_as_one_pastes_them() -> None:
    from jobs.spec.tracking import TrackingSpec
    from jobs.tracking.run import compare_page

    server = TrackingSpec(kind="mlflow", uri="http://host:5000/")
    few = compare_page(server, Path("out"), ["a", "b"], "7", "sweep-1")
    assert few == (
        "compare: http://host:5000/#/compare-runs?runs=%5B%22a%22%2C%20%22b%22%5D&experiments=%5B%227%22%5D"
        "&workflowType=machine_learning"
    )
    many = compare_page(server, Path("out"), [str(n) for n in range(21)], "7", "sweep-1")
    assert many.startswith("compare: http://host:5000/#/experiments/7/runs?workflowType=machine_learning&searchFilter=")
    assert many.endswith("tags.%60weightmill.sweep%60%20%3D%20%27sweep-1%27")
    own = compare_page(TrackingSpec(kind="mlflow"), Path("out"), ["a"], "1")
    assert own == "compare: mlflow ui --backend-store-uri sqlite:///out/mlflow.db, and then http://127.0.0.1:5000"
    here = compare_page(TrackingSpec(kind="mlflow"), Path.cwd() / "out", [str(n) for n in range(30)], "1", "sweep-1")
    assert here == f"{own}; the sweep is tags.`weightmill.sweep` = 'sweep-1'"
