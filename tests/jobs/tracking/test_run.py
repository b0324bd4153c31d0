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


def runs(root: Path, where: str = "") -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("weightmill")
    assert experiment is not None
    return [r for r in client.search_runs([experiment.experiment_id], where) if r.info.run_name != "first"]


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
    assert "mlflow.source.git.commit" in found.data.tags
    assert "version.numba" in found.data.params
    [source_input] = found.inputs.dataset_inputs
    assert source_input.dataset.digest == ran.document["source"]["fingerprint"]
    assert json.loads(source_input.dataset.source)["uri"] == str(source)
    assert source_input.dataset.name == source.name
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    assert [(m.step, m.value > 0) for m in client.get_metric_history(found.info.run_id, "layer/relative_error")] == [
        (0, True),
        (1, True),
    ]
    names = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert names == {"tensors.json", "plan.json", "weightmill.json", "report.html", "error_by_layer.svg", "size.svg"}
    page = Path(client.download_artifacts(found.info.run_id, "report.html", str(tmp_path))).read_bytes()
    assert page == (tmp_path / "whole" / "report.html").read_bytes()
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


def test_pages_of_mlflow_are_addressed_as_one_pastes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.spec.tracking import TrackingSpec
    from jobs.tracking import pages
    from jobs.tracking.pages import compare_page

    server = TrackingSpec(kind="mlflow", uri="http://host:5000/")
    few = compare_page(server, Path("out"), ["a", "b"], "7")
    assert few == (
        "compare: http://host:5000/#/compare-runs?runs=%5B%22a%22%2C%20%22b%22%5D&experiments=%5B%227%22%5D"
        "&workflowType=machine_learning"
    )
    sweep = compare_page(server, Path("out"), ["a", "b"], "7", "sweep-1")
    assert sweep == (
        "compare: http://host:5000/#/experiments/7/runs?workflowType=machine_learning&compareRunsMode=CHART"
        "&viewStateShareKey=sweep-1"
    )
    many = compare_page(server, Path("out"), [str(n) for n in range(21)], "7")
    assert many == "compare: http://host:5000/#/experiments/7/runs?workflowType=machine_learning"
    monkeypatch.setattr(pages, "SERVED_BY", ("sys",))
    own = compare_page(TrackingSpec(kind="mlflow"), Path("out"), ["a"], "1")
    assert (
        own
        == "compare: mlflow ui --backend-store-uri sqlite:///out/mlflow.db, and then http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
    )
    here = compare_page(TrackingSpec(kind="mlflow"), Path.cwd() / "out", [str(n) for n in range(30)], "1", "sweep-1")
    monkeypatch.setattr(pages, "SERVED_BY", ("sys", "no_such_module"))
    bare = compare_page(TrackingSpec(kind="mlflow"), Path("out"), ["a"], "1")
    assert bare == own.replace("mlflow ui", "pip install 'weightmill[ui]', then mlflow ui")
    assert here == f"{own}\n  the sweep is tags.`weightmill.sweep` LIKE '%sweep-1%'"


@pytest.mark.quick
def test_people_filter_by_what_a_run_is_and_see_no_noise(
    store: Path, source: Path, tmp_path: Path, weightmill: Any
) -> None:
    """MLflow's pages hide tags that begin with its own name."""
    wanted = {
        "nf4": ("bitsandbytes", "safetensors", "4"),
        "hqq4": ("hqq", "pytorch", "4"),
        "mlx_int4": ("mlx-lm", "safetensors", "4"),
        "none": ("transformers", "safetensors", "16"),
    }
    for quant, (engine, container, bits) in wanted.items():
        ran, found = run(store, weightmill, source, tmp_path / f"facts-{quant}", f"quant={quant}", "model.name=name")
        assert ran.status == 0, ran.err
        facts = {
            "model": "name", "model_type": "llama", "engine": engine, "container": container, "quant": quant,
            "bits": bits,
        }  # fmt: skip
        assert facts.items() <= found.data.tags.items()
        assert facts.items() <= found.data.params.items()
        seen = {name for name in found.data.tags if not name.startswith("mlflow.")}
        assert seen == {*facts, "weightmill.kind", "weightmill.output"}
        [told] = [each for each in runs(store, f"tags.quant = '{quant}' and params.bits = '{bits}'")
                  if each.info.run_name.startswith("facts")]  # fmt: skip
        assert told.info.run_id == found.info.run_id


def test_an_output_is_linked_and_registered_where_asked(
    store: Path, source: Path, tmp_path: Path, weightmill: Any
) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    for number, quant in enumerate(("nf4", "int8"), 1):
        out = tmp_path / f"registered-{quant}"
        ran, found = run(store, weightmill, source, out, f"quant={quant}", "tracking.register=small model")
        assert ran.status == 0, ran.err
        assert f"registered: small model version {number}; model.path='models:/small model/{number}'" in ran.out
        version = client.get_model_version("small model", str(number))
        assert (version.source, version.run_id, version.tags["quant"]) == (str(out), found.info.run_id, quant)
        [linked] = found.outputs.model_outputs
        assert client.get_logged_model(linked.model_id).tags["weightmill.output"] == str(out)
    again = weightmill("run", "model.path=models:/small model/1", "quant=none", "quant.dtype=bfloat16",
                       f"output.path={tmp_path / 'again'}",
                       f"tracking.uri=sqlite:///{store / 'mlflow.db'}")  # fmt: skip
    assert again.status == 0, again.err
    assert len(client.search_model_versions("name = 'small model'")) == 2
    # An output that is there already is registered as another model then, once.
    for _ in range(2):
        ran, _found = run(
            store, weightmill, source, tmp_path / "registered-nf4", "quant=nf4", "tracking.register=other"
        )
        assert ran.status == 0, ran.err
        assert "only registered" in ran.out
        assert "registered: other version 1; model.path=models:/other/1" in ran.out
    [other] = client.search_model_versions("name = 'other'")
    assert (other.source, other.tags["quant"]) == (str(tmp_path / "registered-nf4"), "nf4")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["tracking=none", "tracking.register=x"], "tracking.register: it is a model in MLflow's registry"),
        (["tracking=mlflow", "tracking.register=a/b"], "tracking.register: expected the name of a model, without /"),
        (
            ["tracking=mlflow", "tracking.register=x", "tracking.uri=http://127.0.0.1:9"],
            "tracking.register: a tracking server registers no folder of this machine",
        ),
    ],
)
def test_what_cannot_be_registered_is_refused(given: list[str], said: str, source: Path, weightmill: Any) -> None:
    ran = weightmill("run", f"model.path={source}", *given)
    assert ran.status == 2
    assert said in " ".join(ran.err.split())


class Logged:
    """A run that remembers what is logged to it."""

    run_id = "run"

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []
        self.beats = 0

    def log(self, points: Any) -> None:
        self.points += points

    def beat(self) -> None:
        self.beats += 1


def test_progress_moves_while_a_job_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes done and the rate since the last point, by seconds of work; then all bytes at the end."""
    from jobs.tracking import recorder
    from jobs.tracking.recorder import Recorder

    now = 0.0
    monkeypatch.setattr(recorder.time, "monotonic", lambda: now)
    watched: list[str] = []
    monkeypatch.setattr(recorder, "system_monitor", lambda run, uri: watched.append(run) or Finished())
    mine, run = Recorder(), Logged()

    class Finished:
        def finish(self) -> None:
            watched.append("finished")

    ends = iter([False] * 3 + [True])

    def pulse(seconds: float) -> bool:
        nonlocal now
        now += seconds
        mine.count(2_000_000_000)
        return next(ends)

    now = 1.0
    mine.count(0)
    mine._alive[run.run_id] = run  # type: ignore[assignment]
    monkeypatch.setattr(mine._stop, "wait", pulse)
    mine._pulse()
    steps = [(round(value / 1e9, 3), step) for name, value, step in run.points if name == "progress/bytes_done"]
    rates = [round(value, 3) for name, value, _ in run.points if name == "progress/gigabytes_per_second"]
    assert steps == [(2, 10), (4, 20), (6, 30)]
    assert rates == [0.2, 0.2, 0.2]
    assert run.beats == 1
    mine.ended(run)  # type: ignore[arg-type]
    assert run.points[-1] == ("progress/bytes_done", 8e9, 41)
    assert watched == ["run", "finished"]
    mine.pool.shutdown()


def test_a_short_job_has_its_progress_too(store: Path, source: Path, tmp_path: Path, weightmill: Any) -> None:
    _, found = run(store, weightmill, source, tmp_path / "short", "unit_mb=0.05")
    assert found.data.metrics["progress/bytes_done"] == found.data.metrics["load/bytes"]
    assert found.data.metrics["progress/gigabytes_per_second"] > 0


def test_units_and_machines_are_logged_beside_bytes_in_few_metrics() -> None:
    from jobs.output.life import MachineSeen, Seen
    from jobs.tracking.recorder import MACHINES, Recorder

    names = ["host 1/é", *(f"host-{number}" for number in range(2, 100))]
    machines = tuple(
        MachineSeen(name=name, flying=1, done=2, retries=0, bytes=1000 - at, bytes_per_s=2e9)
        for at, name in enumerate(names)
    )
    seen = Seen(
        doing="quantizing", seconds=9.0, units=400, done=198, retries=3, work_bytes=10, done_bytes=5, bytes_per_s=1.0,
        machines=machines,
    )  # fmt: skip
    mine = Recorder()
    mine.watch(lambda: seen)
    assert mine._progress() == []  # before the first bytes
    mine.count(1000)
    points = {name: value for name, value, _ in mine._progress()}
    assert (points["progress/units_done"], points["progress/retries"]) == (198, 3)
    by_machine = {name: value for name, value in points.items() if name.startswith("gigabytes_per_second_by_machine/")}
    assert len(by_machine) == MACHINES
    assert by_machine["gigabytes_per_second_by_machine/host 1--"] == 2.0
    mine.close()
