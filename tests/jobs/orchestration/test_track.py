"""Sending to MLflow later what a job could not log; a server that goes in the middle; runs of several sweeps."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.tracking_server import tracking_server

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an empty store; making one takes seconds."""
    from jobs.spec.tracking import TrackingSpec
    from jobs.tracking.run import open_run

    root = tmp_path_factory.mktemp("store")
    open_run(TrackingSpec(kind="mlflow"), root, "first", {}, {}, "key").close("FINISHED")
    return root


def runs(uri: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("weightmill")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def artifacts(uri: str, run: Any) -> set[str]:
    from mlflow.tracking import MlflowClient

    return {each.path for each in MlflowClient(uri).list_artifacts(run.info.run_id)}


def test_what_was_not_tracked_is_sent_later_once(source: Path, tmp_path: Path, store: Path, weightmill: Any) -> None:
    given = [f"model.path={source}", "quant=hqq4", "unit_mb=0.05", "model.name=name", f"output.root={store}"]
    early, out, uri = tmp_path / "early", tmp_path / "late", f"sqlite:///{store / 'mlflow.db'}"
    native = weightmill("run", *given, f"output.path={early}", "tracking=mlflow")
    assert native.status == 0, native.err
    assert weightmill("run", *given, f"output.path={out}").status == 0
    for already in (False, True):
        ran = weightmill("track", out, "format=json")
        assert ran.status == 0, ran.err
        assert ran.document["already"] is already
        [late] = [run for run in runs(uri) if run.info.run_name == "late"]
        assert late.info.run_id in ran.document["tracked"]
    assert late.info.status == "FINISHED"
    assert late.info.end_time - late.info.start_time < 60_000  # as long as the job took, and not until now
    [first] = [run for run in runs(uri) if run.info.run_name == "early"]
    facts = ("model", "model_type", "engine", "container", "quant", "bits")
    assert {name: late.data.tags[name] for name in facts} == {name: first.data.tags[name] for name in facts}
    differing = {"output.path", "tracking.kind"}
    params = {name: value for name, value in late.data.params.items() if name not in differing}
    assert params == {name: value for name, value in first.data.params.items() if name not in differing}
    sent = {name for name in first.data.metrics if not name.startswith(("progress/", "system/"))}
    assert sent == {*late.data.metrics}
    for name in ("size/bits_per_weight", "error/relative", "units/total"):
        assert late.data.metrics[name] == first.data.metrics[name]
    assert artifacts(uri, late) == artifacts(uri, first) - {"plan.json"}
    assert weightmill("track", tmp_path / "nothing").status == 2
    assert weightmill("track", out, "tracking=none").status == 2


def test_a_job_whose_server_goes_in_the_middle_finishes_and_its_numbers_are_sent_later(
    source: Path, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.orchestration import job

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    out, honest = tmp_path / "out", job.complete
    with ExitStack() as server, monkeypatch.context() as patch:
        host = server.enter_context(tracking_server(tmp_path / "server"))

        def gone(*arguments: Any, **others: Any) -> Any:
            while not runs_of(host):
                pass
            server.close()
            return honest(*arguments, **others)

        def runs_of(host: str) -> list[Any]:
            from mlflow.tracking import MlflowClient

            found = MlflowClient(f"http://{host}").get_experiment_by_name("weightmill")
            return [] if found is None else [each for each in runs(f"http://{host}") if each.data.params]

        patch.setattr(job, "complete", gone)
        ran = weightmill("run", f"model.path={source}", f"output.path={out}", f"tracking.uri=http://{host}",
                         "tracking=mlflow")  # fmt: skip
    assert ran.status == 1
    assert "the output is complete, but tracking: not everything was logged" in ran.out
    assert f"to send it: weightmill track {out}" in ran.out
    assert (out / "weightmill.json").exists()
    assert weightmill("status", out).status == 0
    with tracking_server(tmp_path / "server") as host:
        [begun] = runs(f"http://{host}")
        assert begun.info.status == "RUNNING"
        for _ in range(2):
            ran = weightmill("track", out, f"tracking.uri=http://{host}")
            assert ran.status == 0, ran.err
            [found] = runs(f"http://{host}")
            assert (found.info.run_id, found.info.status) == (begun.info.run_id, "FINISHED")
            assert found.data.metrics["size/bits_per_weight"] > 4


def test_a_sweep_that_is_repeated_takes_no_runs_from_an_earlier_one(
    source: Path, tmp_path: Path, store: Path, weightmill: Any
) -> None:
    uri = f"tracking.uri=sqlite:///{store / 'mlflow.db'}"
    given = ["-m", f"model.path={source}", f"output.root={tmp_path / 'o'}", "quant=nf4,fp4", "format=json"]
    names = []
    for more in ([], ["tracking.price_per_hour=1"]):
        ran = weightmill("run", *given, uri, "tracking=mlflow", *more)
        assert ran.status == 0, ran.err
        names.append(ran.document["sweep"])
    assert len({*names}) == 2
    made = [run for run in runs(uri.partition("=")[2]) if "weightmill.sweep.job" in run.data.tags]
    assert [run.data.tags["weightmill.sweep"] for run in made] == [",".join(names)] * 2
    for sweep in (*names, "last"):
        compared = weightmill("compare", f"sweep={sweep}", uri, "format=json")
        assert compared.status == 0, compared.err
        assert len(compared.document["runs"]) == 2
        assert compared.document["title"] == (names[1] if sweep == "last" else sweep)
    assert weightmill("compare", "sweep=sweep", uri).status == 2  # which is a part of both names
