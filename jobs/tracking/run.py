"""MLflow runs, one for each job and one for a sweep: logging to them beside the work, or to none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jobs.output.life import Seen
from jobs.spec.addresses import check_reachable
from jobs.spec.tracking import URI, TrackingSpec
from jobs.tracking.mlflow_run import BackgroundRun, Opening, Source
from jobs.tracking.recorder import Recorder
from loaders.missing import not_installed


class Run(Protocol):
    """The tracked run of a job, or of a sweep, to which its metrics and artifacts are logged."""

    is_tracked: bool

    @property
    def address(self) -> str | None:
        """The page of the run, or the store and the run's id."""
        ...

    @property
    def page(self) -> str | None:
        """The page of the run, as the address of a server of its store goes on: #/experiments/..."""
        ...

    @property
    def run_id(self) -> str | None: ...

    @property
    def registered(self) -> str | None:
        """The version of a model that the output is in MLflow's registry: models:/NAME/VERSION."""
        ...

    def count(self, size: int) -> None:
        """Count bytes that were worked on, which MLflow shows while the work goes on."""
        ...

    def watch(self, seen: Callable[[], Seen]) -> None:
        """Log what is seen of units and machines, as long as the work goes on."""
        ...

    def check(self) -> None:
        """Raise StorageError if the store is known not to be usable."""
        ...

    def metrics(self, values: Mapping[str, float]) -> None: ...

    def series(self, name: str, values: Sequence[tuple[int, float]]) -> None:
        """Log one metric with a value for each step."""
        ...

    def texts(self, made: Callable[[], Mapping[str, str]]) -> None:
        """Log the texts that `made` returns as artifacts, by their names."""
        ...

    def figures(self, draw: Callable[[Path], Sequence[Path]]) -> None:
        """Log the files that `draw` makes in a given folder as artifacts."""
        ...

    def document(self, name: str, value: Any) -> None:
        """Log a JSON artifact."""
        ...

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None: ...

    def describe(self, text: str | Callable[[str], str]) -> None:
        """Set the description on the run's page, in Markdown: a text, or one that is made of the experiment's id."""
        ...

    def output(self, name: str, address: str, params: Mapping[str, str], register: str | None) -> None:
        """Link an output as one of the experiment's models, and register it as a version of the model `register`."""
        ...

    def view(self, key: str, state: Mapping[str, Any]) -> None:
        """Keep a view of the experiment's page, which an address opens by its key."""
        ...

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED, after everything before is logged."""
        ...

    def close(self, status: str | None = None) -> None:
        """Wait until everything is logged (after ending, with a status); StorageError says what could not be."""
        ...


class NoRun:
    """The run of what is not tracked: it logs nothing."""

    is_tracked = False
    address = None
    page = None
    run_id = None
    registered = None

    def count(self, size: int) -> None: ...

    def watch(self, seen: Callable[[], Seen]) -> None: ...

    def check(self) -> None: ...

    def metrics(self, values: Mapping[str, float]) -> None: ...

    def series(self, name: str, values: Sequence[tuple[int, float]]) -> None: ...

    def texts(self, made: Callable[[], Mapping[str, str]]) -> None: ...

    def figures(self, draw: Callable[[Path], Sequence[Path]]) -> None: ...

    def document(self, name: str, value: Any) -> None: ...

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None: ...

    def describe(self, text: str | Callable[[str], str]) -> None: ...

    def output(self, name: str, address: str, params: Mapping[str, str], register: str | None) -> None: ...

    def view(self, key: str, state: Mapping[str, Any]) -> None: ...

    def end(self, status: str) -> None: ...

    def close(self, status: str | None = None) -> None: ...


def check_tracking(spec: TrackingSpec) -> None:
    """Check that MLflow is installed if it is asked for: by name, by a store, or by a model of its registry.

    Raises:
        MissingLibrary: it is not.
    """
    if spec.kind == "none" or not spec.lacks:
        return
    by_environment = spec.uri is not None and spec.uri == os.environ.get(URI)
    asked = {
        "tracking=mlflow": spec.kind == "mlflow",
        f"tracking.uri, which the environment's {URI} names,": by_environment,
        "tracking.uri": spec.uri is not None,
        "tracking.register": spec.register is not None,
    }
    if (what := next((what for what, is_asked in asked.items() if is_asked), None)) is not None:
        raise not_installed(what, spec.lacks, "tracking=none runs without")


def untracked(spec: TrackingSpec) -> list[str]:
    """Return the line that says why a job is not tracked, if the choice was left open; else none."""
    if spec.kind != "auto" or spec.is_on:
        return []
    return [f"not tracked: {not_installed('tracking=auto', spec.lacks)}; tracking=none leaves this line out"]


def open_run(
    spec: TrackingSpec, root: Path, name: str, params: Mapping[str, Any], tags: Mapping[str, str], key: str,
    recorder: Recorder | None = None, *, sources: Sequence[Source] = (), is_published: bool = False,
    past: tuple[float, float] | None = None,
) -> Run:  # fmt: skip
    """Open a run: a new one, or the one with the same key that a stopped job left.

    Of a job that has published its output, this is its newest run, however it ended; a finished one stays as it is.
    `past` has when a job began and ended, in seconds since 1970, that is only logged now.

    It returns at once, since importing mlflow and creating a store take seconds; errors are raised when the run is
    closed. The caller ensures that no two processes use a key at once. StorageError: the server does not answer.
    """
    if not spec.is_on:
        return NoRun()
    if spec.uri is not None and spec.uri.startswith("http"):
        check_reachable("tracking.uri", spec.uri, "tracking=none runs without")
    opening = Opening(
        name=name, params=params, tags=tags, key=key, began=past[0] if past else time.time(), sources=sources,
        is_published=is_published, ended=past[1] if past else None,
    )  # fmt: skip
    return BackgroundRun(spec, root, opening, recorder or Recorder(), is_alone=recorder is None)
