"""One run of MLflow, which a thread logs to beside the work, and its client.

This is the only file that imports mlflow, and only if tracking is enabled.

Only the driver talks to MLflow. Runs are opened and closed through the client, so that a job that failed or was
stopped is recorded as such; the module-level API would close it as finished when the process ends.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.output.former_root import STORE, tracking_root
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.sweep_tag import SWEEP, quoted, with_sweep
from loaders.errors import StorageError
from loaders.storage.address import Address, without_secrets

if TYPE_CHECKING:
    from jobs.tracking.recorder import Recorder

# MLflow's own limits (mlflow/utils/validation.py, 3.17); beyond them it truncates a parameter or refuses a batch.
LONGEST_PARAM = 6000
LONGEST_DIGEST = 36
METRICS_AT_ONCE = 1000
PARAMS_AT_ONCE = 100
# MLflow 3 shows experiments and runs as those of language-model traces unless an address tells it otherwise; up to
# 3.8 the experiment's tag decides.
TRAINING = "workflowType=machine_learning"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
KIND = "weightmill.kind"
# MLflow's pages hide tags that begin with "mlflow.": these are for programs.
HOST, PID, HEARTBEAT, KEY = (f"mlflow.weightmill.{name}" for name in ("host", "pid", "heartbeat", "key"))
# Letters that the name of a model may not have.
NOT_IN_NAMES = re.compile(r"[/:.%\"']")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source of a run, which MLflow shows as a dataset: what it was, with a digest."""

    name: str
    digest: str
    address: Address
    profile: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a run is opened with: `key` finds it again, `began` is its start in seconds since 1970.

    Of a job that has published its output (`is_published`) it is the newest run with the key, however it ended. Of one
    that ended before, whose numbers are sent now, `ended` says when: it gives no signs of life.
    """

    name: str
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    key: str
    began: float
    sources: Sequence[Source] = ()
    is_published: bool = False
    ended: float | None = None


class BackgroundRun:
    """A run whose calls are executed in order by the recorder's thread, which ends with it if it `is_alone`."""

    is_tracked = True

    def __init__(
        self, spec: TrackingSpec, root: Path, opening: Opening, recorder: Recorder, *, is_alone: bool
    ) -> None:  # fmt: skip
        self._recorder = recorder
        self._is_alone = is_alone
        self.count = recorder.count
        self.watch = recorder.watch
        self._errors: list[BaseException] = []
        self._last: Future[None] | None = None

        def opened() -> MlflowRun:
            client, uri, experiment = recorder.store(spec, root)
            return MlflowRun(recorder, client, uri, experiment, opening)

        self._opened: Future[MlflowRun] = recorder.pool.submit(opened)

    def check(self) -> None:
        if self._opened.done() and (failed := self._opened.exception()) is not None:
            raise StorageError(f"tracking.uri: cannot be used ({first_line(failed)}); tracking=none runs without")

    def _later(self, method: str, *arguments: Any) -> None:
        def call() -> None:
            if self._opened.exception() is None and not self._errors and not self._opened.result().is_finished:
                try:
                    getattr(self._opened.result(), method)(*arguments)
                # Stores raise errors of many libraries, and none of them may end a job whose work goes well. The first
                # one is reported when the run is closed.
                except Exception as error:
                    self._errors.append(error)

        self._last = self._recorder.pool.submit(call)

    @property
    def address(self) -> str | None:
        return self._opened.result().address if self._opened.exception() is None else None

    @property
    def run_id(self) -> str | None:
        return self._opened.result().run_id if self._opened.exception() is None else None

    @property
    def page(self) -> str | None:
        return self._opened.result().page if self._opened.exception() is None else None

    @property
    def is_finished(self) -> bool:
        """Whether it was finished before it was opened, and stays as it is."""
        return self._opened.exception() is None and self._opened.result().is_finished

    @property
    def registered(self) -> str | None:
        return self._opened.result().registered if self._opened.exception() is None else None

    def metrics(self, values: Mapping[str, float]) -> None:
        self._later("metrics", dict(values))

    def series(self, name: str, values: Sequence[tuple[int, float]]) -> None:
        self._later("series", name, list(values))

    def texts(self, made: Callable[[], Mapping[str, str]]) -> None:
        self._later("texts", made)

    def figures(self, draw: Callable[[Path], Sequence[Path]]) -> None:
        self._later("figures", draw)

    def document(self, name: str, value: Any) -> None:
        self._later("document", name, value)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        self._later("table", name, columns)

    def describe(self, text: str | Callable[[str], str]) -> None:
        self._later("describe", text)

    def output(self, name: str, address: str, params: Mapping[str, str], register: str | None) -> None:
        self._later("output", name, address, dict(params), register)

    def view(self, key: str, state: Mapping[str, Any]) -> None:
        self._later("view", key, state)

    def end(self, status: str) -> None:
        self._later("close", status)

    def close(self, status: str | None = None) -> None:
        """Close the run as `Run.close`."""
        if status is not None:
            self.end(status)
        if self._last is not None:
            self._last.result()
        if self._is_alone:
            self._recorder.close()
        failed = self._opened.exception() or (self._errors[0] if self._errors else None)
        if failed is not None:
            raise StorageError(f"tracking: not everything was logged: {first_line(failed)}") from failed


class MlflowRun:
    """One run of MLflow's client. It is created and used on the recorder's thread only."""

    def __init__(self, recorder: Recorder, client: Any, uri: str, experiment: str, opening: Opening) -> None:
        self._recorder, self._client, self._experiment = recorder, client, experiment
        found = self._find(opening)
        self.is_finished = found is not None and found.info.status == "FINISHED"
        self.registered: str | None = None
        self.run_id = self._new(opening) if found is None else str(found.info.run_id)
        self.page = page_of(experiment, self.run_id)
        self.address = run_page(uri, experiment, self.run_id)
        self._ended = None if opening.ended is None else int(opening.ended * 1000)
        if self.is_finished:
            return
        if found is not None:
            known = found.data.tags.get(SWEEP, "")
            of = {SWEEP: with_sweep(known, opening.tags[SWEEP])} if SWEEP in opening.tags else {}
            self._resume({**opening.tags, **of})
        self._log_params(opening.params)
        for source in opening.sources:
            self._log_source(source)
        if opening.ended is None:
            recorder.live(self)

    def _find(self, opening: Opening) -> Any | None:
        """Find a run of this job that did not end, since its process was killed; of a published job, any run."""
        left = "" if opening.is_published else " and attributes.status != 'FINISHED' and attributes.status != 'FAILED'"
        return found_by_key(self._client, self._experiment, opening.key, left)

    def _resume(self, tags: Mapping[str, str]) -> None:
        self._client.update_run(self.run_id, status="RUNNING")
        for name, value in {**tags, **here(), "weightmill.resumed": "true"}.items():
            self._client.set_tag(self.run_id, name, value)

    def _new(self, opening: Opening) -> str:
        tags = {**opening.tags, **here(), KEY: opening.key}
        began = int(opening.began * 1000)
        run = self._client.create_run(self._experiment, run_name=opening.name, tags=tags, start_time=began)
        return str(run.info.run_id)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        # MLflow refuses to change a parameter, and a resumed run has its parameters already.
        known = self._client.get_run(self.run_id).data.params
        logged = [Param(k, str(v)[:LONGEST_PARAM]) for k, v in params.items() if k not in known]
        for start in range(0, len(logged), PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, params=logged[start : start + PARAMS_AT_ONCE])

    def _log_source(self, source: Source) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kinds = {"hf": "hugging_face", "https": "http", "file": "local"}
        scheme, shown = source.address.scheme, str(source.address)
        kind = kinds.get(scheme, scheme) or "local"
        # Each kind of MLflow's has its address under another name.
        where = {"uri": shown, "url": shown, "path": shown}
        data = Dataset(
            source.name, source.digest[:LONGEST_DIGEST], kind, json.dumps(where), profile=json.dumps(source.profile)
        )
        self._client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "source")])])

    def metrics(self, values: Mapping[str, float]) -> None:
        self.log([(name, value, 0) for name, value in values.items()])

    def series(self, name: str, values: Sequence[tuple[int, float]]) -> None:
        self.log([(name, value, step) for step, value in values])

    def log(self, points: Sequence[tuple[str, float, int]]) -> None:
        """Log values of metrics with their steps."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value, step in points]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_AT_ONCE])

    def texts(self, made: Callable[[], Mapping[str, str]]) -> None:
        for name, text in made().items():
            self._client.log_text(self.run_id, text, name)

    def figures(self, draw: Callable[[Path], Sequence[Path]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for path in draw(Path(folder)):
                self._client.log_artifact(self.run_id, str(path))

    def document(self, name: str, value: Any) -> None:
        self._client.log_dict(self.run_id, value, name)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        rows = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        self._client.log_dict(self.run_id, rows, name)
        # Without this tag, MLflow's page shows the table as JSON text.
        shown = [{"path": name, "type": "table"}]
        self._client.set_tag(self.run_id, "mlflow.loggedArtifacts", json.dumps(shown))

    def describe(self, text: str | Callable[[str], str]) -> None:
        said = text if isinstance(text, str) else text(self._experiment)
        self._client.set_tag(self.run_id, "mlflow.note.content", said)

    def output(self, name: str, address: str, params: Mapping[str, str], register: str | None) -> None:
        """Link an output to the run, as one of the experiment's models; and register it as a version of a model."""
        from mlflow.entities import LoggedModelOutput

        tags = {"weightmill.output": address}
        made = self._client.create_logged_model(
            self._experiment, NOT_IN_NAMES.sub("-", name), source_run_id=self.run_id, tags=tags, params=dict(params),
            model_type="weightmill",
        )  # fmt: skip
        self._client.finalize_logged_model(made.model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(made.model_id, 0)])
        if register is not None:
            self.registered = registered(self._client, register, address, self.run_id, {**params, **tags})

    def view(self, key: str, state: Mapping[str, Any]) -> None:
        """Keep a view of the experiment's page, as the page's own "Share" does; an address opens it by its key."""
        self._client.set_experiment_tag(self._experiment, f"mlflow.sharedViewState.{key}", json.dumps(state))

    def beat(self) -> None:
        self._client.set_tag(self.run_id, HEARTBEAT, str(int(time.time())))

    def close(self, status: str) -> None:
        self._recorder.ended(self)
        self._client.set_terminated(self.run_id, status, end_time=self._ended)


def registered(client: Any, model: str, address: str, run_id: str | None, tags: Mapping[str, str]) -> str:
    """Make an output a version of a registered model, if it is none yet; returns "models:/NAME/VERSION".

    `run_id` is the run that made the output, by which an output is told from an earlier one at the same address.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        # Another job has made it.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name={quoted(model)}")
    versions = [each for each in known if each.source == address and each.run_id in (run_id, run_id or "")]
    made = versions[0] if versions else client.create_model_version(
        model, source=address, run_id=run_id, tags=dict(tags), await_creation_for=0
    )  # fmt: skip
    return f"models:/{model}/{made.version}"


def found_by_key(client: Any, experiment: str, key: str, where: str = "") -> Any | None:
    """Return the newest run with a job's key, among those that match the rest of MLflow's filter."""
    newest = ["attributes.start_time DESC"]
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'{where}", max_results=1, order_by=newest)
    return found[0] if found else None


def run_page(uri: str, experiment: str, run_id: str) -> str:
    """Return the page of a run, or for a database the store and the run's id."""
    shown = without_secrets(uri)
    page = f"{shown.rstrip('/')}/{page_of(experiment, run_id)}"
    return page if uri.startswith("http") else f"{shown} run {run_id}"


def page_of(experiment: str, run_id: str) -> str:
    """Return the page of a run, as the address of a server goes on."""
    return f"#/experiments/{experiment}/runs/{run_id}?{TRAINING}"


def here() -> dict[str, str]:
    """Return the tags of the process that works on a run, by which `compare` tells running jobs from crashed ones."""
    return {HOST: socket.gethostname(), PID: str(os.getpid()), HEARTBEAT: str(int(time.time()))}


def warm(uri: str | None) -> None:
    """Import MLflow beside what the caller does next; it takes more than a second, half of it for databases."""
    threading.Thread(target=_imported, args=(uri is None or not uri.startswith("http"),), name="mlflow-import").start()


def _imported(for_databases: bool) -> None:
    # What is wrong with it is said where it is used.
    with suppress(ImportError):
        _client_class()
        if for_databases:
            importlib.import_module("mlflow.store.tracking.sqlalchemy_store")


def mlflow_client(uri: str) -> Any:
    return _client_class()(uri)


def _client_class() -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A job whose work is done waits for its numbers: by default two minutes for a server that is gone. They can be sent
    # later (`weightmill track`).
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    # Standard output is for the job's result.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow.tracking import MlflowClient

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return MlflowClient


def system_monitor(run_id: str, uri: str) -> Any:
    """Start MLflow's own watch over this machine (CPU, memory, disk, network, GPUs), a thread that logs to a run."""
    from mlflow.system_metrics import system_metrics_monitor

    watch: Any = system_metrics_monitor.SystemMetricsMonitor
    monitor = watch(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def experiment_of(client: Any, name: str, uri: str, root: Path) -> str:
    """Return the id of an experiment, which is made if there is none."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = (root / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=local, tags=EXPERIMENT_TAGS))


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, in which there may be the store's address, without its password."""
    return without_secrets(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def default_uri(root: Path) -> str:
    """Return the address of the sqlite store in the folder of outputs, or in the one of earlier versions."""
    return f"sqlite:///{tracking_root(root) / STORE}"
