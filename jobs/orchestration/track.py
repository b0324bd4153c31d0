"""Sending a finished job's numbers to MLflow later: by its report, without its source."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError
from rich.console import Group
from rich.text import Text

from jobs.cli.verb import Said
from jobs.output.report import Report, read_report
from jobs.planning.targets import target_of
from jobs.spec.job import JobSpec
from jobs.spec.tracking import EXPERIMENT, TrackingSpec
from jobs.tracking.job_run import open_past_run, past_facts, track_report
from jobs.tracking.pages import run_lines
from jobs.tracking.run import check_tracking
from loaders.errors import BadSpec, WeightmillError
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import OUR_PAGE
from loaders.storage.hashes import text_digest


def track(output: Address, tracking: TrackingSpec, root: str | None) -> Said:
    """Log a finished output to MLflow: to the run that its job began, or to a new one. A finished run stays as it is.

    The store is that of the settings, else the job's own; `root` is the folder of the default one.

    Raises:
        BadSpec: there is no output, or its report's request is of another version.
        StorageError: MLflow did not take all of it.
    """
    report = read_report(output)
    spec = _request(output, report)
    tracking = _tracking(tracking, spec.tracking)
    if not tracking.is_on:
        raise BadSpec("tracking: there is nothing to send to with tracking=none; give tracking=mlflow")
    check_tracking(tracking)
    made_at = _made_at(spec, output)
    folder = spec.output.local_root if root is None else Path(root)
    key = text_digest(f"{report.run.key} {made_at}")
    run = open_past_run(tracking, spec, folder, report, key, made_at)
    page = _page(output)
    track_report(run, spec, Address.of(made_at), report, page)
    run.output(output.name, str(output), past_facts(spec, report), tracking.register)
    run.end("FINISHED")
    run.close()
    was_there = run.is_finished
    how = "MLflow has all of it already" if was_there else "sent to MLflow"
    text = Group(Text(f"{output}: {how}"), *run_lines(run.address, run.page))
    document = {"status": "done", "output": str(output), "already": was_there, "tracked": run.address}
    return Said(document, text)


def _request(output: Address, report: Report) -> JobSpec:
    """Return the request that made an output.

    Raises:
        BadSpec: it is of another version of weightmill.
    """
    try:
        spec = JobSpec.model_validate_json(json.dumps(report.run.request))
        target_of(spec)
        return spec
    except (ValidationError, WeightmillError, ValueError) as error:
        made = report.versions.get("weightmill", "another version")
        first = next(iter(str(error).splitlines()), "")
        raise BadSpec(
            f"output.path: {output} was made by weightmill {made}, whose settings this version does not know ({first});"
            " track it with that version"
        ) from None


def _tracking(given: TrackingSpec, of_job: TrackingSpec) -> TrackingSpec:
    """Return where to track: as is said now, and what is not said as the job had it."""
    experiment = of_job.experiment if given.experiment == EXPERIMENT else given.experiment
    uri, register = given.uri or of_job.uri, given.register or of_job.register
    return given.model_copy(update={"uri": uri, "experiment": experiment, "register": register})


def _made_at(spec: JobSpec, output: Address) -> str:
    """Return the address at which a job made its output, by which its run is found, wherever the output lies now."""
    try:
        return str(spec.output_address)
    except BadSpec:
        return str(output)


def _page(output: Address) -> bytes | None:
    store = open_store(output)
    entry = store.find(OUR_PAGE)
    return None if entry is None else bytes(store.read(entry, 0, entry.size))
