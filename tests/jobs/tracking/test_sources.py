"""models:/ and runs:/ as sources: the addresses behind, and one clear error for what is not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.compose import compose, take_apart
from jobs.spec.job import JobSpec
from jobs.tracking.mlflow_run import mlflow_client
from jobs.tracking.sources import Lookup, located
from loaders.errors import BadSpec
from loaders.loading.load import load_weights
from loaders.storage.address import Address
from tests.making import make_source
from tests.object_servers import environment, http, s3

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, and sqlalchemy's


@dataclass(frozen=True)
class Kept:
    """A store of MLflow with a run whose artifacts hold a checkpoint, which is registered as `m` 1 and 2 (@best)."""

    uri: str
    client: Any
    run: str
    artifacts: Path


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store; making one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def kept(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    (tmp_path / "kept").mkdir()
    uri = f"sqlite:///{shutil.copy(empty, tmp_path / 'kept' / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow_client(uri)
    run = client.create_run(
        client.create_experiment("e", artifact_location=(tmp_path / "kept" / "arti facts").as_uri())
    )
    artifacts = tmp_path / "kept" / "arti facts" / run.info.run_id / "artifacts"
    make_source(artifacts / "export")
    client.create_registered_model("m")
    for _ in range(2):
        client.create_model_version("m", f"{run.info.artifact_uri}/export", run.info.run_id)
    client.set_registered_model_alias("m", "best", "2")
    return Kept(uri, client, run.info.run_id, artifacts)


def source_of(*given: str) -> tuple[JobSpec, list[str]]:
    notes: list[str] = []
    return located(compose("run", JobSpec, take_apart("run", JobSpec, given)), notes.append), notes


@pytest.mark.parametrize(
    "address", ["models:/m/1", "models:/m/latest", "models:/m@best", "models:/m/best", "runs:/{run}/export"]
)
def test_each_form_is_the_folder_behind(address: str, kept: Kept) -> None:
    address = address.format(run=kept.run)
    spec, notes = source_of(f"model.path={address}")
    assert spec.model.path == str(kept.artifacts / "export")
    assert spec.model_name == ("export" if "runs" in address else "m")
    assert notes == [f"model.path: {address} is {kept.artifacts / 'export'}"]


def test_the_latest_is_the_highest_number(kept: Kept) -> None:
    for number in range(3, 12):
        make_source(kept.artifacts / f"v{number}")
        kept.client.create_model_version("m", f"{kept.artifacts}/v{number}", kept.run)
    assert source_of("model.path=models:/m/latest")[0].model.path == str(kept.artifacts / "v11")


def test_jobs_run_from_it_and_every_verb_reads_it(kept: Kept, weightmill: Any, tmp_path: Path) -> None:
    ran = weightmill("run", "model.path=models:/m@best", "quant=nf4", f"output.root={tmp_path}", "format=json")
    assert ran.status == 0, ran.err
    assert ran.document["output"] == str(tmp_path / "m-nf4")
    assert "model.path: models:/m@best is " in ran.err
    for verb, *given in (
        ("plan", "model.path=models:/m/1", "quant=hqq4"),
        ("inspect", "model.path=models:/m/1"),
        ("lint", "output.path=models:/m/1"),
        ("recommend", "model.path=models:/m/1"),
        ("diff", "a=models:/m/1", f"b=runs:/{kept.run}/export"),
        ("verify", f"output.path={tmp_path / 'm-nf4'}", "model.path=models:/m/2"),
        ("run", "-m", "model.path=models:/m/1", "quant=nf4,hqq4", f"output.root={tmp_path / 'sweep'}"),
    ):
        ran = weightmill(verb, *given)
        assert ran.status == 0, (verb, ran.err)
    assert (tmp_path / "sweep" / "m-hqq4" / "README.md").exists()


def test_a_model_of_mlflows_flavor_has_its_weights_in_a_folder(kept: Kept) -> None:
    model = kept.artifacts / "logged"
    make_source(model / "model")
    (model / "MLmodel").write_text(
        "flavors:\n  transformers:\n    model_binary: model\n    components: [tokenizer]\n"
        "    source_model_name: org/name\n"
    )
    spec, notes = source_of(f"model.path=runs:/{kept.run}/logged")
    assert spec.model.path == str(model / "model")
    assert spec.model_name == "logged"
    assert f"MLflow keeps the tokenizer apart, in {model}/components" in notes[0]


def test_a_model_without_weights_is_the_hubs(kept: Kept) -> None:
    model = kept.artifacts / "reference"
    model.mkdir(parents=True)
    (model / "MLmodel").write_text(
        "flavors:\n  transformers:\n    source_model_name: org/name\n    source_model_revision: abc\n"
    )
    assert source_of(f"model.path=runs:/{kept.run}/reference")[0].model.path == "hf://org/name@abc"


@pytest.mark.parametrize(
    "described", ["model_binary: ../../other", "model_binary: /etc", "model_binary: [a]", "{", "- a", "&a [*a]"]
)
def test_an_odd_description_leads_nowhere_else(described: str, kept: Kept) -> None:
    model = kept.artifacts / "odd"
    make_source(model / "data" / "model")
    (model / "MLmodel").write_text(f"flavors:\n  transformers:\n    {described}\n")
    assert source_of(f"model.path=runs:/{kept.run}/odd")[0].model.path == str(model / "data" / "model")


def test_a_logged_model_of_mlflow_3(kept: Kept) -> None:
    run = kept.client.get_run(kept.run)
    logged = kept.client.create_logged_model(run.info.experiment_id, name="net", source_run_id=kept.run)
    place = Path(logged.artifact_location.removeprefix("file://").replace("%20", " "))
    make_source(place / "model")
    assert source_of(f"model.path=models:/{logged.model_id}")[0].model.path == str(place / "model")
    kept.client.create_model_version("m", f"models:/{logged.model_id}", kept.run, model_id=logged.model_id)
    assert source_of("model.path=models:/m/3")[0].model.path == str(place / "model")
    kept.client.log_outputs(kept.run, models=[_output(logged.model_id)])
    assert source_of(f"model.path=runs:/{kept.run}/net")[0].model.path == str(place / "model")


def _output(model_id: str) -> Any:
    from mlflow.entities import LoggedModelOutput

    return LoggedModelOutput(model_id=model_id, step=0)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("models:/other/1", "no model 'other' is registered in sqlite:///"),
        ("models:/other/1", "tracking.uri=, or MLFLOW_TRACKING_URI in the environment, names another"),
        ("models:/m/7", "has no version or alias '7'; it has 1, 2, @best"),
        ("models:/m@worst", "has no version or alias 'worst'; it has 1, 2, @best"),
        ("models:/m", "expected models:/NAME/VERSION"),
        ("models:/m/1/x", "expected models:/NAME/VERSION"),
        ("runs:/0123456789abcdef0123456789abcdef/export", "no run 0123456789abcdef0123456789abcdef in sqlite:///"),
        ("runs:/{run}/../../x", "expected models:/NAME/VERSION"),
        ("models:/m-0123456789abcdef0123456789abcdef", "no logged model m-0123456789abcdef0123456789abcdef in"),
        ("runs:/{run}/nothing", "expected a folder of weights at"),
    ],
)
def test_what_is_not_there_is_one_clear_error(address: str, said: str, kept: Kept, weightmill: Any) -> None:
    ran = weightmill("inspect", f"model.path={address.format(run=kept.run)}")
    assert ran.status == 2, ran.err
    assert "model.path: " in ran.err
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_without_an_mlflow_to_look_in_it_says_how_to_name_one(
    weightmill: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ran = weightmill("run", "model.path=models:/m/1")
    assert ran.status == 2
    assert "no MLflow is named to look in; set tracking.uri, or MLFLOW_TRACKING_URI" in ran.err
    ran = weightmill("run", "model.path=models:/m/1", f"tracking.uri=sqlite:///{tmp_path}/none.db")
    assert "there is no store sqlite:///" in ran.err
    assert not (tmp_path / "none.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    ran = weightmill("inspect", "model.path=models:/m/1")
    assert ran.status == 1
    assert "nobody answers at http://127.0.0.1:9" in ran.err


def test_a_damaged_store_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weightmill: Any) -> None:
    (tmp_path / "bad.db").write_text("no database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/bad.db")
    ran = weightmill("inspect", "model.path=models:/m/1")
    assert ran.status == 1, ran.err
    assert "cannot be read" in ran.err
    assert "Traceback" not in ran.err


def test_an_output_is_not_written_into_mlflow(kept: Kept, weightmill: Any) -> None:
    ran = weightmill("run", "output.path=models:/m/3")
    assert ran.status == 2
    assert "output.path: models:/m/3 is read by jobs alone" in ran.err


def test_the_library_says_that_it_asks_nobody() -> None:
    with pytest.raises(BadSpec, match="models:/m/1 is read by jobs alone, which ask MLflow"):
        load_weights("models:/m/1")


def test_artifacts_in_other_stores(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    lookup = Lookup("model.path", kept.uri)
    assert lookup._store_of("s3://bucket/x/artifacts").text == "s3://bucket/x/artifacts"
    proxied = lookup._store_of("mlflow-artifacts://host:5000/1/r/artifacts/my model").text
    assert proxied == "http://host:5000/api/2.0/mlflow-artifacts/artifacts/1/r/artifacts/my%20model"
    with pytest.raises(BadSpec, match="is kept by a tracking server"):
        lookup._store_of("mlflow-artifacts:/1/r")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sec/ret")
    lookup._opened.uri = "https://host/mlflow"
    found = lookup._store_of("mlflow-artifacts:/1/r")
    assert found.text == "https://me:sec%2Fret@host/mlflow/api/2.0/mlflow-artifacts/artifacts/1/r"
    assert "sec" not in str(found)


def test_a_store_that_is_not_read_is_named(kept: Kept) -> None:
    kept.client.create_model_version("m", "dbfs:/models/x", kept.run)
    with pytest.raises(BadSpec, match="dbfs:/models/x is in no store that is read here"):
        source_of("model.path=models:/m/3")


@pytest.fixture
def in_a_bucket(kept: Kept) -> Iterator[Address]:
    """The checkpoint in a bucket, as the model's version 3; its address."""
    pytest.importorskip("moto")
    import botocore.session

    with s3() as bucket:
        client = botocore.session.Session().create_client("s3", region_name="us-east-1")
        folder = kept.artifacts / "export"
        for path in (each for each in folder.rglob("*") if each.is_file()):
            key = f"runs/1/artifacts/model/{path.relative_to(folder).as_posix()}"
            client.put_object(Bucket=bucket.text.removeprefix("s3://"), Key=key, Body=path.read_bytes())
        kept.client.create_model_version("m", f"{bucket.text}/runs/1/artifacts", kept.run)
        yield bucket / "runs/1/artifacts/model"


def test_artifacts_in_a_bucket(in_a_bucket: Address, weightmill: Any, tmp_path: Path) -> None:
    ran = weightmill("run", "model.path=models:/m/3", "quant=nf4", f"output.path={tmp_path / 'out'}")
    assert ran.status == 0, ran.err
    assert f"model.path: models:/m/3 is {in_a_bucket}" in ran.err
    assert f"model.path={in_a_bucket}" in (tmp_path / "out" / "README.md").read_text()


def test_a_sweep_looks_once_and_with_its_settings_of_stores(
    in_a_bucket: Address, weightmill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, looked = os.environ["AWS_ENDPOINT_URL"], list[Address]()
    checkpoint = Lookup.checkpoint

    def counted(lookup: Lookup, address: Address, tell: Callable[[str], None]) -> Address:
        looked.append(address)
        return checkpoint(lookup, address, tell)

    monkeypatch.setattr(Lookup, "checkpoint", counted)
    (tmp_path / "empty").mkdir()
    # monkeypatch, older than the bucket's server, would set the variable back to that when it is gone.
    with http(tmp_path / "empty") as (elsewhere, _), environment({"AWS_ENDPOINT_URL": elsewhere.text}):
        given = ("quant=nf4,hqq4", f"store.endpoint={endpoint}", f"output.root={tmp_path / 'outs'}")
        ran = weightmill("run", "-m", "model.path=models:/m/latest", *given)
    assert ran.status == 0, ran.err
    assert f"model.path: models:/m/latest is {in_a_bucket}" in ran.err
    assert looked == [Address("models:/m/latest")]
