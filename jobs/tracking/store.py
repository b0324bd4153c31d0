"""Reading runs from MLflow: those of a sweep, of an experiment, or by name; and which of them crashed."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.report.comparison import model_of
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.mlflow_run import HEARTBEAT, HOST, KIND, PID, default_uri
from jobs.tracking.reading import OpenedStore, check_installed, lacks_file
from jobs.tracking.recorder import BEAT_S
from jobs.tracking.sweep_tag import SWEEP, of_sweep, sweeps_in
from loaders.errors import BadSpec

SILENT_S = 10 * BEAT_S  # seconds without a heartbeat after which a run on another machine is taken for crashed

WITHOUT = "runs='[FOLDER,...]' compares outputs without"


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """A run in MLflow. `status` is done, failed, killed, running, or crashed: not ended, but its process is gone."""

    run_id: str
    name: str
    status: str
    why: str
    metrics: Mapping[str, float]
    output: str | None
    source: str  # the model that was quantized, and its fingerprint
    fingerprint: str
    client: Any
    sweeps: tuple[str, ...] = ()

    def series(self, name: str) -> dict[int, float]:
        """Return the values of a metric by step; empty if the run does not have it."""
        if name not in self.metrics:
            return {}
        points = sorted((point.step, point.value) for point in self.client.get_metric_history(self.run_id, name))
        return dict(points)

    def artifact(self, name: str) -> Any:
        """Return a JSON artifact, or None if it cannot be read.

        Stores raise errors of many libraries; a comparison goes on without the artifact in any case.
        """
        with tempfile.TemporaryDirectory() as folder, suppress(Exception):
            return json.loads(Path(self.client.download_artifacts(self.run_id, name, folder)).read_bytes())
        return None


class Store:
    """The runs of an experiment.

    Raises:
        BadSpec: the store or the experiment does not exist.
        StorageError: the store cannot be read.
    """

    def __init__(self, spec: TrackingSpec, root: Path) -> None:
        uri, self.name = spec.uri or default_uri(root), spec.experiment
        check_installed("tracking.uri", uri, WITHOUT)
        if lacks_file(uri):
            path = uri.removeprefix("sqlite:///")
            raise BadSpec(f"tracking.uri: no {path}; give output.root or tracking.uri as the jobs had it")
        opened = OpenedStore("tracking.uri", uri, WITHOUT)
        self._client, self._reading, self.shown = opened.client, opened.reading, opened.shown
        with self._reading():
            found = self._client.get_experiment_by_name(spec.experiment)
            known = [] if found else [each.name for each in self._client.search_experiments()]
        if found is None:
            raise BadSpec(f"tracking.experiment: no {spec.experiment!r} in {self.shown}; known: {', '.join(known)}")
        self.experiment = str(found.experiment_id)

    def all(self, where: str = "") -> list[Tracked]:
        """Return all runs that match MLflow's filter `where`, oldest first."""
        found, token = list[Tracked](), None
        with self._reading():
            while True:
                page = self._client.search_runs(
                    [self.experiment], where, order_by=["attributes.start_time ASC"], page_token=token
                )
                # A sweep's own run is no job.
                found += [self._tracked(run) for run in page if run.data.tags.get(KIND) != "sweep"]
                token = page.token
                if not token:
                    return found

    def of_sweep(self, name: str, where: str = "") -> list[Tracked]:
        mine = of_sweep(name)
        return [run for run in self.all(f"{mine} and {where}" if where else mine) if name in run.sweeps]

    def last_sweep(self) -> str | None:
        """Return the sweep of the newest run that belongs to one; None if no run does."""
        with self._reading():
            found = self._client.search_runs(
                [self.experiment], f"tags.`{SWEEP}` LIKE '%'", order_by=["attributes.start_time DESC"], max_results=1
            )
        return next(reversed(sweeps_in(found[0].data.tags[SWEEP])), None) if found else None

    def named(self, runs: Sequence[str], where: str = "") -> list[Tracked]:
        """Return runs by their ids or names.

        Raises:
            BadSpec: a run does not exist.
        """
        known, chosen = self.all(where), []
        for wanted in runs:
            found = [run for run in known if wanted in (run.run_id, run.name)]
            if not found:
                names = ", ".join(dict.fromkeys(run.name for run in known))
                raise BadSpec(f"runs: no folder of an output and no run {wanted!r} in {self.shown}; known: {names}")
            chosen += found
        return chosen

    def _tracked(self, run: Any) -> Tracked:
        status, why = _status(run)
        metrics, params = dict(run.data.metrics), run.data.params
        request = {
            part: {key: value for name, value in params.items() if (key := name.removeprefix(f"{part}.")) != name}
            for part in ("model", "transform")
        }
        return Tracked(
            run_id=run.info.run_id, name=run.info.run_name or run.info.run_id, status=status, why=why, metrics=metrics,
            output=run.data.tags.get("weightmill.output"), source=model_of(request),
            fingerprint=run.data.tags.get("weightmill.source", ""), client=self._client,
            sweeps=tuple(sweeps_in(run.data.tags.get(SWEEP, ""))),
        )  # fmt: skip


def _status(run: Any) -> tuple[str, str]:
    """Return a run's status, and for a run that did not end, how the status is known."""
    ended = {"FINISHED": "done", "FAILED": "failed", "KILLED": "killed"}.get(run.info.status)
    if ended is not None:
        return ended, ""
    tags, began = run.data.tags, (run.info.start_time or 0) / 1000
    if tags.get(HOST) == socket.gethostname() and tags.get(PID, "").isdigit():
        seen = float(tags.get(HEARTBEAT, began))
        # A process that began after the last heartbeat has the same id by chance.
        born = _process_began(int(tags[PID]))
        if born is None or born > seen + 1:
            return "crashed", f"its process, {tags[PID]}, is gone"
        return "running", f"process {tags[PID]}"
    silent = time.time() - float(tags.get(HEARTBEAT, began))
    if silent > SILENT_S:
        return "crashed", f"no sign of life from {tags.get(HOST, 'its machine')} for {silent / 60:.0f} minutes"
    return "running", f"on {tags.get(HOST, 'another machine')}"


def _process_began(pid: int) -> float | None:
    """Return when a local process began, in seconds since 1970; 0 if the system does not tell, None if it is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        # It exists, and belongs to another user.
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A zombie has ended; only its parent has not waited for it.
        if fields[0] == "Z":
            return None
        booted = next(int(row.split()[1]) for row in Path("/proc/stat").read_text().splitlines() if "btime" in row)
        return booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # Only Linux has /proc with these fields.
    except (OSError, StopIteration, ValueError, IndexError):
        return 0.0
