"""Comparing jobs: finding their runs in MLflow or their outputs in folders, and writing the comparison."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Group

from jobs.cli.verb import Said, note
from jobs.output.report import read_report
from jobs.report.comparison import ComparedJob, compared_job, to_json
from jobs.report.comparisons import Comparisons
from jobs.report.plots import comparison_plot, drawn
from jobs.report.tables import whole
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.pages import compare_page
from jobs.tracking.store import Store, Tracked
from loaders.errors import BadSpec, io_errors
from loaders.presets.naming import joined
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.atomic import write_file
from loaders.storage.base import OUR_REPORT
from loaders.storage.json_files import json_bytes
from loaders.words import counted

MANY = 10  # runs from which on reading them takes seconds, so that a note is shown
LISTED = 50  # tensors that differ most, listed in the document


def compare(
    tracking: TrackingSpec, root: str, path: str | None, *, sweep: str, runs: Sequence[str], where: str,
    error: str | None,
) -> Said:  # fmt: skip
    """Compare the runs of a sweep, or the given runs and output folders.

    `where` is MLflow's filter, `error` the metric to compare with bits per weight (None: of each model what its
    jobs were judged by), `path` the folder of the comparison.

    Raises:
        BadSpec: there are no such runs, or none has the metric.
        StorageError: the tracking store cannot be read.
    """
    folders = [run for run in runs if _is_output(run)]
    if no_outputs := [run for run in runs if run not in folders and os.path.lexists(run)]:
        raise BadSpec(
            f"runs: expected an output of weightmill at {no_outputs[0]}, found no {OUR_REPORT} there; of a folder of"
            f" outputs give those in it ({no_outputs[0]}/*), or sweep=all"
        )
    named = [run for run in runs if run not in folders]
    title, candidates, page = "runs", [_of_folder(Address.of(folder)) for folder in folders], None
    if named or not runs:
        with _named_so(named):
            store = Store(tracking, Path(root))
        title, found = _find(store, sweep, named, where) if not runs else (title, store.named(named, where))
        if len(found) > MANY:
            note(f"reading {counted(len(found), 'run and its table', 'runs and their tables')}")
        candidates += [_of_run(run) for run in found]
        ids, of = [run.run_id for run in found], None if runs or sweep == "all" else title
        page = compare_page(tracking, Path(root), ids, store.experiment, of) if ids else None
    candidates = _told_apart(candidates)
    if (
        error is not None
        and not any(error in c.metrics for c in candidates)
        and any(c.is_comparable for c in candidates)
    ):
        known = sorted({name for c in candidates for name in c.metrics if name.startswith(("error", "quality"))})
        raise BadSpec(f"error: no run has {error!r}; known: {', '.join(known)}")
    # Another comparison of runs must not replace this one.
    name = joined(c.name for c in candidates).removeprefix("-") if runs else title
    folder = Path(path) if path else Path(root) / "comparisons" / (name or title)
    return _said(title, candidates, error, folder, page)


@contextmanager
def _named_so(named: Sequence[str]) -> Iterator[None]:
    """Say of a store of runs that is not there what it was wanted for: an address may have a slip."""
    try:
        yield
    except BadSpec as error:
        if not named:
            raise
        raise BadSpec(f"runs: no output at {named[0]}, and no runs to find that name among: {error}") from None


def _find(store: Store, sweep: str, named: Sequence[str], where: str) -> tuple[str, list[Tracked]]:
    if sweep == "all":
        return store.name, store.all(where)
    name = store.last_sweep() if sweep == "last" else sweep
    if name is None:
        raise BadSpec(f"sweep: no sweep in experiment {store.name!r} of {store.shown}; sweep=all compares all its runs")
    found = store.of_sweep(name, where)
    if not found:
        raise BadSpec(
            f"sweep: no run of {name!r} in experiment {store.name!r} of {store.shown}; sweep=last is the newest"
        )
    return name, found


def _is_output(run: str) -> bool:
    """Whether an argument is the address of an output, and not the name or id of a run."""
    # It is no address of a known kind of store.
    with suppress(BadSpec):
        return open_store(run).find(OUR_REPORT) is not None
    return False


def _of_folder(output: Address) -> ComparedJob:
    return compared_job(output.real.name, read_report(output), None, str(output))


def _of_run(run: Tracked) -> ComparedJob:
    layers = run.series("layer/relative_error") if run.metrics else {}
    tensors = _errors(run.artifact("tensors.json")) if run.status == "done" else {}
    return ComparedJob(
        name=run.name,
        status=run.status,
        metrics=run.metrics,
        run_id=run.run_id,
        output=run.output,
        why=run.why,
        source=run.source,
        fingerprint=run.fingerprint,
        layers=layers,
        tensors=tensors,
    )


def _errors(rows: Any) -> Mapping[str, float]:
    """Return relative errors by tensor, from the table artifact of a run."""
    if not isinstance(rows, dict):
        return {}
    name, error = rows["columns"].index("name"), rows["columns"].index("relative_error")
    return {row[name]: row[error] for row in rows["data"] if row[error] is not None}


def _told_apart(candidates: Sequence[ComparedJob]) -> list[ComparedJob]:
    """Add a part of the run id to names that several runs have."""
    names = [c.name for c in candidates]
    return [
        c
        if names.count(c.name) == 1
        else ComparedJob(**{**vars(c), "name": f"{c.name} {(c.run_id or c.output or '')[:8]}"})
        for c in candidates
    ]


def _said(title: str, candidates: Sequence[ComparedJob], error: str | None, folder: Path, page: str | None) -> Said:
    compared = Comparisons(candidates, error)
    models = compared.document(LISTED)
    with io_errors("making", folder):
        folder.mkdir(parents=True, exist_ok=True)
    picture = drawn(folder / "compare.png", lambda path: comparison_plot(compared.of, path))
    names = ["compare.md", *([] if picture is None else [picture.name]), "compare.json"]
    document = {
        "status": "done",
        "title": title,
        "error": error or " ".join(dict.fromkeys(model["error"] for model in models)),
        "runs": [to_json(job) for job in compared.jobs],
        "pareto": compared.front,
        "differing": [row for model in models for row in model["differing"]],
        "models": models,
        "compare": page,
        "files": [str(folder / name) for name in names],
    }
    text = compared.markdown(title, None if picture is None else picture.name)
    write_file(folder / "compare.md", text.encode())
    write_file(folder / "compare.json", json_bytes(document))
    lines = [
        *compared.lines(),
        f"written: {folder}/{', '.join(names)}",
        *([whole(page)] if page else []),
    ]
    of = f" of {len(models)} models, compared each by itself" if len(models) > 1 else ""
    return Said(document, Group(f"{title}: {counted(len(compared.jobs), 'run')}{of}", *lines))
