"""MLflow's sqlite store is made whole or not at all; and a published job has one run, wherever it was interrupted."""

from __future__ import annotations

import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.orchestration import job as jobs_job
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.mlflow_run import mlflow_client
from jobs.tracking.run import open_run
from jobs.tracking.sqlite_store import whole_store
from loaders.errors import StorageError
from tests.making import write_checkpoint
from tests.processes import start

pytestmark = pytest.mark.filterwarnings("ignore")


def experiments(path: Path) -> list[str]:
    return [each.name for each in mlflow_client(f"sqlite:///{path}").search_experiments()]


def test_a_job_that_is_killed_while_it_makes_the_store_leaves_none(tmp_path: Path, weightmill: Any) -> None:
    given = ("model=demo", f"output.root={tmp_path}", "quant=none", "tracking=mlflow")
    process = start("-m", "jobs.run", *given)
    new, whole = tmp_path / ".mlflow.db.new", tmp_path / "mlflow.db"
    while process.poll() is None and not (new.exists() and new.stat().st_size):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert new.exists()
    assert not whole.exists()
    ran = weightmill("run", *given)
    assert ran.status == 0, ran.err + ran.out
    assert "weightmill" in experiments(whole)
    assert not new.exists()


def test_nothing_is_renamed_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mlflow.db"
    seen: list[list[str]] = []
    honest = Path.replace

    def replace(self: Path, target: Path) -> Path:
        seen.append([each.name for each in self.parent.iterdir()])
        assert "Default" in experiments(self)
        return honest(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    path.touch()  # as sqlite leaves it that was only opened
    with whole_store(f"sqlite:///{path}", mlflow_client) as client:
        assert client.search_experiments()
    assert not any(name.endswith(("-journal", "-wal")) for name in seen[0])
    with whole_store(f"sqlite:///{path}", mlflow_client):
        assert len(seen) == 1


def half_made(path: Path) -> None:
    """A store of which tables stand that a later migration makes."""
    with sqlite3.connect(path) as opened:
        opened.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        opened.execute("CREATE TABLE spans (trace_id VARCHAR(50))")
    opened.close()


@pytest.mark.parametrize("make", [half_made, lambda path: path.write_bytes(b"no database at all" * 100)])
def test_a_store_that_is_not_whole_is_named(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "mlflow.db")
    run = open_run(TrackingSpec(kind="mlflow"), tmp_path, "name", {}, {}, "key")
    with pytest.raises(
        StorageError, match=r"mlflow\.db is no whole store of MLflow: a job was killed .*; move it away"
    ):
        run.close("FINISHED")


def test_mlflows_variables_count_where_the_request_is_silent(
    tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{there}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    ran = weightmill("run", "model=demo", "quant=none", "tracking=mlflow", "format=json")
    assert ran.status == 0, ran.err
    assert str(there) in ran.document["tracked"]
    assert "theirs" in experiments(there)
    assert ran.document["run"]["request"]["tracking"]["experiment"] == "theirs"
    said = TrackingSpec(kind="mlflow", uri="sqlite:////other.db", experiment="mine")
    assert (said.uri, said.experiment) == ("sqlite:////other.db", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    silent = TrackingSpec(kind="mlflow")
    assert (silent.uri, silent.experiment) == (None, "weightmill")


def test_a_variable_that_is_no_store_is_named(weightmill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://me:secret@host")
    ran = weightmill("plan", "model=demo", "quant=none")
    assert ran.status == 2
    assert (
        "tracking.uri: the environment's MLFLOW_TRACKING_URI is 'gopher://***@host'; expected a store such as"
        in ran.err
    )


# --- twins


@pytest.mark.parametrize("when", ["finished", "logging"])
def test_a_job_that_is_interrupted_after_publishing_has_one_run(
    when: str, tmp_path: Path, weightmill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    given = ("run", f"model.path={source}", f"output.path={tmp_path / 'out'}", f"output.root={tmp_path}", "quant=nf4",
             "tracking=mlflow")  # fmt: skip
    with monkeypatch.context() as patch:
        if when == "logging":
            honest = jobs_job.track_job

            def interrupted(*given: Any) -> None:
                honest(*given)
                raise KeyboardInterrupt

            patch.setattr(jobs_job, "track_job", interrupted)
            assert weightmill(*given).status == 130
        else:
            patch.setattr("jobs.output.journal.Journal.remove", lambda self: signal.raise_signal(signal.SIGINT))
            # A shell has what it starts in the background ignore interrupts, and a job leaves that as it is.
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                assert weightmill(*given).status == 130
            finally:
                signal.signal(signal.SIGINT, before)
    again = weightmill(*given)
    assert again.status == 0, again.err
    assert "was published before the job was interrupted" in again.err
    client = mlflow_client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [found] = client.search_runs([client.get_experiment_by_name("weightmill").experiment_id])
    assert found.info.status == "FINISHED"
    assert len(client.get_metric_history(found.info.run_id, "size/bits_per_weight")) == (2 if when == "logging" else 1)
    assert found.info.run_id in again.out
