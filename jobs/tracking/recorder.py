"""The thread that talks to MLflow beside the work, and what is logged while the work goes on."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.output.life import Seen
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.mlflow_run import (
    MlflowRun,
    default_uri,
    experiment_of,
    found_by_key,
    mlflow_client,
    registered,
    system_monitor,
)
from jobs.tracking.sqlite_store import whole_store
from jobs.tracking.sweep_tag import SWEEP, with_sweep

NOT_IN_KEYS = re.compile(r"[^\w.\- ]", re.ASCII)  # what the name of a metric may not have
# Seconds between two points of progress, which is also when the machine is first looked at.
PULSE_S = 10.0
PULSES_A_BEAT = 3
# Seconds between two heartbeats of a run. A run without ten of them counts as crashed, so short outages do not matter;
# more frequent ones would be a load on a server with many jobs.
BEAT_S = PULSE_S * PULSES_A_BEAT
MACHINES = 64  # that have a rate of their own; of more, those that did most
WATCHED = 20  # runs that get points of progress; of a sweep with more jobs, its own run and the first of these


class Recorder:
    """The one thread that talks to MLflow for all runs of the process, their stores, heartbeats and progress."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._stores: dict[tuple[str, str], tuple[Any, str]] = {}
        self._alive: dict[str, MlflowRun] = {}
        self._stop = threading.Event()
        self._pulses: threading.Thread | None = None
        self._began = self._counted = 0.0  # when bytes were first and last counted
        self._bytes = 0
        self._seen: Callable[[], Seen] | None = None
        self._last = (0.0, 0)  # when progress was last logged, in seconds since the beginning, and its bytes
        self._uri = ""
        self._monitor: Any = None

    def count(self, size: int) -> None:
        """Count bytes that were worked on; negative ones are worked on again. One thread counts at a time."""
        self._counted = time.monotonic()
        self._began = self._began or self._counted
        self._bytes += size

    def watch(self, seen: Callable[[], Seen]) -> None:
        """Log what is seen of the work's units and machines, beside the bytes."""
        self._seen = seen

    def store(self, spec: TrackingSpec, root: Path) -> tuple[Any, str, str]:
        """Return the client, the store's address and the experiment's id; they are created at the first call."""
        uri = spec.uri or default_uri(root)
        if (uri, spec.experiment) not in self._stores:
            with whole_store(uri, mlflow_client) as client:
                self._stores[uri, spec.experiment] = client, experiment_of(client, spec.experiment, uri, root)
        client, experiment = self._stores[uri, spec.experiment]
        self._uri = uri
        return client, uri, experiment

    def experiment_of(self, spec: TrackingSpec) -> str:
        """Return the id of an experiment that was used; "0", MLflow's default experiment, if it was not."""
        return next((found for (_, name), (_, found) in self._stores.items() if name == spec.experiment), "0")

    def live(self, run: MlflowRun) -> None:
        self._alive[run.run_id] = run
        if self._pulses is None:
            self._pulses = threading.Thread(target=self._pulse, name="mlflow-pulse", daemon=True)
            self._pulses.start()

    def ended(self, run: MlflowRun) -> None:
        """Log a run's last point of progress, and forget it."""
        if self._alive.pop(run.run_id, None) is not None and self._bytes:
            took = self._counted - self._began
            points = [("progress/bytes_done", float(self._bytes), int(took) + 1)]
            # A job that ends before the first pulse has its mean rate.
            if not self._last[0] and took:
                points.append(("progress/gigabytes_per_second", self._bytes / took / 1e9, int(took) + 1))
            run.log([*points, *self._units(int(took) + 1)])
        if not self._alive:
            self._stop_monitor()

    def _pulse(self) -> None:
        pulses = 0
        while not self._stop.wait(PULSE_S):
            pulses += 1
            # A store that does not answer now may answer at the next one; `close` reports errors of logging.
            with suppress(Exception):
                self._watch_machine()
            points = self._progress()
            for index, run in enumerate(list(self._alive.values())):
                with suppress(Exception):
                    if points and index < WATCHED:
                        run.log(points)
                    if pulses % PULSES_A_BEAT == 0:
                        run.beat()

    def _progress(self) -> list[tuple[str, float, int]]:
        """Return the next points of progress: bytes done, and the rate since the last ones."""
        done = self._bytes
        if not done:
            return []
        now = time.monotonic() - self._began
        (before, were_done), self._last = self._last, (now, done)
        rate = max(0, done - were_done) / max(1e-9, now - before) / 1e9
        moved = [("progress/bytes_done", done, int(now)), ("progress/gigabytes_per_second", rate, int(now))]
        return [*moved, *self._units(int(now)), *self._machines(int(now))]

    def _units(self, step: int) -> list[tuple[str, float, int]]:
        if self._seen is None:
            return []
        seen = self._seen()
        counts = {"units_done": seen.done, "units_in_flight": len(seen.flying), "retries": seen.retries}
        return [(f"progress/{name}", float(count), step) for name, count in counts.items()]

    def _machines(self, step: int) -> list[tuple[str, float, int]]:
        """Return the rate of each machine over the last seconds, if there are several."""
        machines = () if self._seen is None else self._seen().machines
        if len(machines) < 2:
            return []
        most = sorted(machines, key=lambda each: -each.bytes)[:MACHINES]
        rates = {NOT_IN_KEYS.sub("-", each.name)[:100]: each.bytes_per_s / 1e9 for each in most}
        return [(f"gigabytes_per_second_by_machine/{name}", rate, step) for name, rate in rates.items()]

    def _watch_machine(self) -> None:
        """Watch the machine for the first run that lives: that of a sweep, or of a single job."""
        if self._monitor is None and (first := next(iter(self._alive), None)) is not None:
            self._monitor = system_monitor(first, self._uri)

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def adopt(
        self, spec: TrackingSpec, root: Path, key: str, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> Future[str | None]:
        """Add tags and metrics to the finished run with a key; the future's result is its id, None if there is none.

        The sweeps that it was of before stay in its tag.
        """

        def call() -> str | None:
            client, _, experiment = self.store(spec, root)
            found = found_by_key(client, experiment, key)
            if found is None:
                return None
            for name, value in tags.items():
                said = with_sweep(found.data.tags.get(SWEEP, ""), value) if name == SWEEP else value
                client.set_tag(found.info.run_id, name, said)
            for name, number in metrics.items():
                client.log_metric(found.info.run_id, name, number)
            return str(found.info.run_id)

        return self.pool.submit(call)

    def register(
        self, spec: TrackingSpec, root: Path, key: str, output: str, facts: Mapping[str, str]
    ) -> Future[str]:  # fmt: skip
        """Register the output of the job with a key as `spec.register`; the future's result is models:/NAME/VERSION."""
        model = spec.register
        assert model is not None

        def call() -> str:
            client, _, experiment = self.store(spec, root)
            found = found_by_key(client, experiment, key)
            run_id = None if found is None else str(found.info.run_id)
            return registered(client, model, output, run_id, {**facts, "weightmill.output": output})

        return self.pool.submit(call)

    def close(self) -> None:
        self._stop.set()
        self.pool.shutdown(wait=True)
        self._stop_monitor()
