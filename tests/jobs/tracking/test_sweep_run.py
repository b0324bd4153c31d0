"""A sweep's own run in MLflow, and the sweep's page beside its outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.report.test_page import TAGS, Looked

pytestmark = pytest.mark.filterwarnings("ignore")
QUANTS = ("nf4", "mlx_int4", "int8")


def swept(weightmill: Any, source: Path, root: Path, *more: str) -> Any:
    return weightmill(
        "run", "-m", f"model.path={source}", f"output.root={root}", "tracking=mlflow", f"quant={','.join(QUANTS)}",
        "format=json", *more,
    )  # fmt: skip


def tracked(root: Path) -> tuple[Any, Any, list[Any]]:
    """Return MLflow's client, the sweep's own run, and its jobs' runs."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("weightmill")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    [own] = [run for run in found if run.data.tags["weightmill.kind"] == "sweep"]
    return client, own, [run for run in found if run is not own]


def test_a_sweep_has_a_run_of_its_own_beside_those_of_its_jobs(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = swept(weightmill, source, tmp_path)
    assert ran.status == 0, ran.err
    client, own, jobs = tracked(tmp_path)
    assert own.info.status == "FINISHED"
    assert own.info.run_name == ran.document["sweep"]
    assert len(jobs) == len(QUANTS)
    assert not any("mlflow.parentRunId" in run.data.tags for run in jobs)
    assert own.data.tags["quant"] == ", ".join(sorted(QUANTS))
    assert own.data.metrics["jobs/done"] == len(QUANTS)
    assert own.data.metrics["progress/bytes_done"] > 0
    [dataset] = [each.dataset for each in own.inputs.dataset_inputs]
    assert dataset.digest == jobs[0].inputs.dataset_inputs[0].dataset.digest
    assert {each.path for each in client.list_artifacts(own.info.run_id)} == {"jobs.json", "pareto.svg", "report.html"}
    table = json.loads(Path(client.download_artifacts(own.info.run_id, "jobs.json", str(tmp_path / ".."))).read_text())
    # The smallest first, as in all tables of jobs.
    assert sorted(row[0] for row in table["data"]) == sorted(f"{source.name}-{quant}" for quant in QUANTS)
    bits = table["columns"].index("bits per weight")
    assert [row[bits] for row in table["data"]] == sorted((row[bits] for row in table["data"]), key=float)
    for run in jobs:
        assert (
            f"(#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?" in own.data.tags["mlflow.note.content"]
        )

    # The link on the sweep's own page opens a view which is a tag of the experiment.
    state = json.loads(
        client.get_experiment(own.info.experiment_id).tags[f"mlflow.sharedViewState.{own.info.run_name}"]
    )
    assert f"viewStateShareKey={own.info.run_name}" in own.data.tags["mlflow.note.content"]
    assert own.info.run_name in ran.document["compare"]
    listed = client.search_runs([own.info.experiment_id], state["searchFilter"])
    assert {run.info.run_id for run in listed} == {run.info.run_id for run in jobs}
    scatter, differs = state["compareRunCharts"]
    assert {axis["key"] for axis in (scatter["xaxis"], scatter["yaxis"])} <= jobs[0].data.metrics.keys()
    assert differs["showDifferencesOnly"]

    compared = weightmill("compare", f"output.root={tmp_path}", "format=json")
    assert sorted(run["name"] for run in compared.document["runs"]) == sorted(run.info.run_name for run in jobs)


def test_a_sweep_that_was_done_keeps_its_run(source: Path, tmp_path: Path, weightmill: Any) -> None:
    swept(weightmill, source, tmp_path)
    _, first, _ = tracked(tmp_path)
    swept(weightmill, source, tmp_path)
    _, again, _ = tracked(tmp_path)
    assert again.info.run_id == first.info.run_id


def test_a_failed_job_fails_its_sweeps_run_and_is_on_its_page(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = swept(weightmill, source, tmp_path, "verify.max_relative_error=0.05")
    assert ran.status == 1
    _, own, _ = tracked(tmp_path)
    assert own.info.status == "FAILED"
    assert own.data.metrics["jobs/failed"] == 2
    assert "failed: not published" in Looked(Path(ran.document["page"]).read_text()).text


@pytest.mark.quick
def test_a_sweeps_page_leads_to_its_jobs(source: Path, tmp_path: Path, weightmill: Any) -> None:
    ran = swept(weightmill, source, tmp_path / "o", "tracking=none")
    page = Path(ran.document["page"])
    assert page == tmp_path / "o" / f"{ran.document['sweep']}.html"
    looked = Looked(page.read_text())
    assert looked.tags <= TAGS
    assert sorted(looked.leads_to) == sorted(f"{source.name}-{quant}/report.html" for quant in QUANTS)
    assert all((page.parent / each).is_file() for each in looked.leads_to)
    assert "Pareto front" in looked.text


def test_models_are_not_mixed_on_a_page(source: Path, tmp_path: Path, weightmill: Any) -> None:
    from loaders.places import DEMO

    ran = weightmill("run", "-m", f"model.path={source},{DEMO}", f"output.root={tmp_path / 'o'}", "quant=nf4,int8",
                     "format=json", "tracking=none")  # fmt: skip
    assert ran.status == 0, ran.err
    page = Path(ran.document["page"]).read_text()
    assert page.count("<h2>") == page.count("<svg") == 2
