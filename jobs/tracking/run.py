"""MLflow runs, one for each job. This is the only file that imports mlflow, and only if tracking is enabled.

Only the driver talks to MLflow. Runs are opened and closed through the client, so that a job that failed or was
stopped is recorded as such; the module-level API would close it as finished when the process ends.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from jobs.spec.addresses import check_reachable
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.sqlite_store import whole_store
from loaders.errors import StorageError
from loaders.storage.address import without_secrets

# MLflow's own limits (mlflow/utils/validation.py, 3.17); beyond them it truncates a parameter or refuses a batch.
LONGEST_PARAM = 6000
METRICS_AT_ONCE = 1000
PARAMS_AT_ONCE = 100
# Seconds between two heartbeats of a run. A run without ten of them counts as crashed, so short outages do not matter;
# more frequent ones would be a load on a server with many jobs.
BEAT_S = 30.0
COMPARED = 20  # runs that MLflow's compare page shows side by side; more are listed
# MLflow 3 shows experiments and runs as those of language-model traces unless it is told otherwise.
TRAINING = "workflowType=machine_learning"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
HOST, PID, HEARTBEAT, SWEEP = "weightmill.host", "weightmill.pid", "weightmill.heartbeat", "weightmill.sweep"


class Run(Protocol):
    """The tracked run of a job, to which its metrics and artifacts are logged."""

    is_tracked: bool

    @property
    def address(self) -> str | None:
        """The page of the run, or the store and the run's id."""
        ...

    @property
    def run_id(self) -> str | None: ...

    def check(self) -> None:
        """Raise StorageError if the store is known not to be usable."""
        ...

    def metrics(self, values: Mapping[str, float]) -> None: ...

    def series(self, name: str, values: Sequence[tuple[int, float]]) -> None:
        """Log one metric with a value for each step."""
        ...

    def figures(self, draw: Callable[[Path], Sequence[Path]]) -> None:
        """Log the files that `draw` makes in a given folder as artifacts."""
        ...

    def document(self, name: str, value: Any) -> None:
        """Log a JSON artifact."""
        ...

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None: ...

    def describe(self, text: str) -> None:
        """Set the description on the run's page, in Markdown."""
        ...

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED, after everything before is logged."""
        ...

    def close(self, status: str | None = None) -> None:
        """Wait until everything is logged (after ending, with a status); StorageError says what could not be."""
        ...


class NoRun:
    """The run of tracking=none, which logs nothing."""

    is_tracked = False
    address = None
    run_id = None

    def check(self) -> None: ...

    def metrics(self, values: Mapping[str, float]) -> None: ...

    def series(self, name: str, values: Sequence[tuple[int, float]]) -> None: ...

    def figures(self, draw: Callable[[Path], Sequence[Path]]) -> None: ...

    def document(self, name: str, value: Any) -> None: ...

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None: ...

    def describe(self, text: str) -> None: ...

    def end(self, status: str) -> None: ...

    def close(self, status: str | None = None) -> None: ...


class Recorder:
    """The one thread that talks to MLflow for all runs of the process, their stores, and the runs' heartbeat."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._stores: dict[tuple[str, str], tuple[Any, str]] = {}
        self._alive: dict[str, Any] = {}
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    def store(self, spec: TrackingSpec, root: Path) -> tuple[Any, str, str]:
        """Return the client, the store's address and the experiment's id; they are created at the first call."""
        uri = spec.uri or default_uri(root)
        if (uri, spec.experiment) not in self._stores:
            with whole_store(uri, mlflow_client) as client:
                self._stores[uri, spec.experiment] = client, _experiment(client, spec.experiment, uri, root)
        client, experiment = self._stores[uri, spec.experiment]
        return client, uri, experiment

    def experiment_of(self, spec: TrackingSpec) -> str:
        """Return the id of an experiment that was used; "0", MLflow's default experiment, if it was not."""
        return next((found for (_, name), (_, found) in self._stores.items() if name == spec.experiment), "0")

    def live(self, run: str, client: Any) -> None:
        self._alive[run] = client
        if self._beats is None:
            self._beats = threading.Thread(target=self._beat, name="mlflow-heartbeat", daemon=True)
            self._beats.start()

    def ended(self, run: str) -> None:
        self._alive.pop(run, None)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            for run, client in list(self._alive.items()):
                # A store that does not answer now may answer at the next beat; `close` reports errors of logging.
                with suppress(Exception):
                    client.set_tag(run, HEARTBEAT, str(int(time.time())))

    def adopt(
        self, spec: TrackingSpec, root: Path, key: str, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> Future[str | None]:
        """Add tags and metrics to the finished run with a key; the future's result is its id, None if there is none."""

        def call() -> str | None:
            client, _, experiment = self.store(spec, root)
            found = client.search_runs([experiment], f"tags.`weightmill.key` = '{key}'", max_results=1)
            for name, value in tags.items() if found else ():
                client.set_tag(found[0].info.run_id, name, value)
            for name, number in metrics.items() if found else ():
                client.log_metric(found[0].info.run_id, name, number)
            return str(found[0].info.run_id) if found else None

        return self.pool.submit(call)

    def close(self) -> None:
        self._stop.set()
        self.pool.shutdown(wait=True)


def open_run(
    spec: TrackingSpec, root: Path, name: str, params: Mapping[str, Any], tags: Mapping[str, str], key: str,
    recorder: Recorder | None = None, *, is_published: bool = False,
) -> Run:  # fmt: skip
    """Open a run: a new one, or the one with the same key that a stopped job left.

    Of a job that has published its output, this is its newest run, however it ended; a finished one stays as it is.

    It returns at once, since importing mlflow and creating a store take seconds; errors are raised when the run is
    closed. The caller ensures that no two processes use a key at once. StorageError: the server does not answer.
    """
    if spec.kind == "none":
        return NoRun()
    if spec.uri is not None and spec.uri.startswith("http"):
        check_reachable("tracking.uri", spec.uri, "tracking=none runs without")
    return BackgroundRun(spec, root, name, params, tags, key, recorder, is_published=is_published)


class BackgroundRun:
    """A run whose calls are executed in order by the recorder's thread."""

    is_tracked = True

    def __init__(
        self, spec: TrackingSpec, root: Path, name: str, params: Mapping[str, Any], tags: Mapping[str, str], key: str,
        recorder: Recorder | None, *, is_published: bool = False,
    ) -> None:  # fmt: skip
        self._own = Recorder() if recorder is None else None
        self._recorder = recorder or self._own or Recorder()
        self._errors: list[BaseException] = []
        self._last: Future[None] | None = None
        began = time.time()
        self._opened: Future[MlflowRun] = self._recorder.pool.submit(
            MlflowRun, self._recorder, spec, root, name, params, tags, key, began, is_published=is_published
        )

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

    def metrics(self, values: Mapping[str, float]) -> None:
        self._later("metrics", dict(values))

    def series(self, name: str, values: Sequence[tuple[int, float]]) -> None:
        self._later("series", name, list(values))

    def figures(self, draw: Callable[[Path], Sequence[Path]]) -> None:
        self._later("figures", draw)

    def document(self, name: str, value: Any) -> None:
        self._later("document", name, value)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        self._later("table", name, columns)

    def describe(self, text: str) -> None:
        self._later("describe", text)

    def end(self, status: str) -> None:
        self._later("close", status)

    def close(self, status: str | None = None) -> None:
        """Close the run as `Run.close`."""
        if status is not None:
            self.end(status)
        if self._last is not None:
            self._last.result()
        if self._own is not None:
            self._own.close()
        failed = self._opened.exception() or (self._errors[0] if self._errors else None)
        if failed is not None:
            raise StorageError(f"tracking: not everything was logged: {first_line(failed)}") from failed


class MlflowRun:
    """One run of MLflow's client. It is created and used on the recorder's thread only."""

    def __init__(
        self, recorder: Recorder, spec: TrackingSpec, root: Path, name: str, params: Mapping[str, Any],
        tags: Mapping[str, str], key: str, began: float, *, is_published: bool,
    ) -> None:  # fmt: skip
        self._began = began
        self._recorder = recorder
        self._client, self._uri, self._experiment = recorder.store(spec, root)
        found = self._find(key, is_published=is_published)
        self.is_finished = found is not None and found.info.status == "FINISHED"
        self._run = self._new(name, {**tags, "weightmill.key": key}) if found is None else str(found.info.run_id)
        self.run_id = self._run
        shown = without_secrets(self._uri)
        page = f"{shown.rstrip('/')}/#/experiments/{self._experiment}/runs/{self._run}?{TRAINING}"
        self.address = page if self._uri.startswith("http") else f"{shown} run {self._run}"
        if self.is_finished:
            return
        if found is not None:
            self._resume(tags)
        self._log_params(params)
        recorder.live(self._run, self._client)

    def _find(self, key: str, *, is_published: bool) -> Any | None:
        """Find a run of this job that did not end, since its process was killed; of a published job, any run."""
        left = "" if is_published else " and attributes.status != 'FINISHED' and attributes.status != 'FAILED'"
        mine, newest = f"tags.`weightmill.key` = '{key}'{left}", ["attributes.start_time DESC"]
        found = self._client.search_runs([self._experiment], mine, max_results=1, order_by=newest)
        return found[0] if found else None

    def _resume(self, tags: Mapping[str, str]) -> None:
        self._client.update_run(self._run, status="RUNNING")
        for name, value in {**tags, **here(), "weightmill.resumed": "true"}.items():
            self._client.set_tag(self._run, name, value)

    def _new(self, name: str, tags: Mapping[str, str]) -> str:
        run = self._client.create_run(
            self._experiment, run_name=name, tags={**tags, **here()}, start_time=int(self._began * 1000)
        )
        return str(run.info.run_id)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        # MLflow refuses to change a parameter, and a resumed run has its parameters already.
        known = self._client.get_run(self._run).data.params
        logged = [Param(k, str(v)[:LONGEST_PARAM]) for k, v in params.items() if k not in known]
        for start in range(0, len(logged), PARAMS_AT_ONCE):
            self._client.log_batch(self._run, params=logged[start : start + PARAMS_AT_ONCE])

    def metrics(self, values: Mapping[str, float]) -> None:
        self._log([(name, value, 0) for name, value in values.items()])

    def series(self, name: str, values: Sequence[tuple[int, float]]) -> None:
        self._log([(name, value, step) for step, value in values])

    def _log(self, points: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value, step in points]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[start : start + METRICS_AT_ONCE])

    def figures(self, draw: Callable[[Path], Sequence[Path]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for path in draw(Path(folder)):
                self._client.log_artifact(self._run, str(path))

    def document(self, name: str, value: Any) -> None:
        self._client.log_dict(self._run, value, name)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        rows = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        self._client.log_dict(self._run, rows, name)
        # Without this tag, MLflow's page shows the table as JSON text.
        shown = [{"path": name, "type": "table"}]
        self._client.set_tag(self._run, "mlflow.loggedArtifacts", json.dumps(shown))

    def describe(self, text: str) -> None:
        self._client.set_tag(self._run, "mlflow.note.content", text)

    def close(self, status: str) -> None:
        self._recorder.ended(self._run)
        self._client.set_terminated(self._run, status)


def compare_page(spec: TrackingSpec, root: Path, runs: Sequence[str], experiment: str, sweep: str | None = None) -> str:
    """Return the page on which MLflow compares runs, or lists those of a sweep if they are more than COMPARED.

    For a store that no server serves, it is the command that does, and by what the sweep's runs are found.
    """
    uri = without_secrets(spec.uri or default_uri(root))
    if not uri.startswith("http"):
        return f"compare: {how_to_open(uri)}{f'; the sweep is tags.`{SWEEP}` = {sweep!r}' if sweep else ''}"
    page = (
        f"#/compare-runs?runs={quote(json.dumps(list(runs)))}&experiments={quote(json.dumps([experiment]))}&{TRAINING}"
    )
    if len(runs) > COMPARED:
        mine = f"tags.`{SWEEP}` = '{sweep}'"
        page = f"#/experiments/{experiment}/runs?{TRAINING}" + (
            f"&searchFilter={quote(mine, safe='')}" if sweep else ""
        )
    return f"compare: {uri.rstrip('/')}/{page}"


def how_to_open(uri: str) -> str:
    """Say how the page of a store is opened that no server serves yet; a database below here is named from here."""
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and path.is_relative_to(Path.cwd()):
        uri = f"sqlite:///{path.relative_to(Path.cwd())}"
    return f"mlflow ui --backend-store-uri {uri}, and then http://127.0.0.1:5000"


def here() -> dict[str, str]:
    """Return the tags of the process that works on a run, by which `compare` tells running jobs from crashed ones."""
    return {HOST: socket.gethostname(), PID: str(os.getpid()), HEARTBEAT: str(int(time.time()))}


def mlflow_client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Standard output is for the job's result.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow.tracking import MlflowClient

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return MlflowClient(uri)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, in which there may be the store's address, without its password."""
    return without_secrets(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def default_uri(root: Path) -> str:
    """Return the address of the sqlite store in the folder of outputs."""
    return f"sqlite:///{root / 'mlflow.db'}"


def _experiment(client: Any, name: str, uri: str, root: Path) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = (root / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=local, tags=EXPERIMENT_TAGS))
