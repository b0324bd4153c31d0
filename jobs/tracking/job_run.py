"""A job's run in MLflow: its parameters, tags, metrics and artifacts."""

from __future__ import annotations

import getpass
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from jobs.mixed_precision.allocation import mix_document
from jobs.output.journal import Journal
from jobs.output.report import Report
from jobs.planning.plan import TargetPlan
from jobs.report.document import versions
from jobs.report.metrics import error_by_layer, metrics, table_columns
from jobs.report.plots import plots
from jobs.spec.job import JobSpec
from jobs.tracking.run import SWEEP, Recorder, Run, open_run
from loaders.places import ROOT
from loaders.presets.auto import AutoQuant
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT
from loaders.storage.hashes import text_digest

CHOSEN = "quant.chosen."  # the mix, which lists every tensor: too long for parameters, it is logged as an artifact


def open_job_run(
    spec: JobSpec, journal: Journal, fingerprint: str, recorder: Recorder | None, *, sweep: str | None, number: int,
    is_published: bool = False,
) -> Run:  # fmt: skip
    """Open a job's run: a new one, or the one that an interrupted attempt with the same key left.

    Raises:
        StorageError: the tracking server does not answer.
    """
    params = {k: v for k, v in flat(spec.resolved()) if v is not None and not k.startswith(CHOSEN)}
    tags = {
        "weightmill.kind": "job",
        "weightmill.source": fingerprint,
        "weightmill.output": str(journal.output),
        "weightmill.git_commit": _git_commit(),
        **_shown_by_mlflow(),
        **{f"weightmill.version.{name}": version for name, version in versions().items()},
        **sweep_tags(sweep, number),
    }
    root, name = spec.output.local_root, spec.output_address.name
    return open_run(spec.tracking, root, name, params, tags, run_key(journal), recorder, is_published=is_published)


def run_key(journal: Journal) -> str:
    """Return the key of a job in MLflow: a digest of its plan and its output's address."""
    return text_digest(f"{journal.key} {journal.output}")


def track_job(
    run: Run, spec: JobSpec, target: TargetPlan, output: Address, report: Report, plan: Mapping[str, Any]
) -> None:
    """Log a finished job's report and plan."""
    run.describe(_description(spec, output, report))
    run.metrics(metrics(report))
    run.series("layer/relative_error", [(layer, e.relative_error) for layer, e in error_by_layer(report).items()])
    run.table("tensors.json", table_columns(report))
    run.document("plan.json", plan)
    run.document(OUR_REPORT, report.to_json())
    if isinstance(spec.quant, AutoQuant):
        run.document("mix.json", mix_document(spec.quant, target.decisions))
    run.figures(lambda folder: plots(report, folder))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings: {"quant": {"group_size": 64}} gives ("quant.group_size", 64)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def sweep_tags(sweep: str | None, number: int) -> dict[str, str]:
    """Return the tags that mark a run as part of a sweep; none without a sweep."""
    return {} if sweep is None else {SWEEP: sweep, f"{SWEEP}.job": str(number)}


@cache
def _shown_by_mlflow() -> dict[str, str]:
    """Return the tags from which MLflow's pages show who made a run, and with what program."""
    found = {"mlflow.source.name": "python -m jobs.run", "mlflow.source.type": "LOCAL"}
    if _git_commit() != "none":
        found["mlflow.source.git.commit"] = _git_commit()
    # In many containers, the user id has no name.
    with suppress(KeyError, OSError):
        found["mlflow.user"] = getpass.getuser()
    return found


@cache
def _git_commit() -> str:
    """Return the git commit of this checkout of weightmill; "none" for an installed package."""
    if not (ROOT / ".git").exists():
        return "none"
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


def _description(spec: JobSpec, output: Address, report: Report) -> str:
    """Return a short Markdown description of the job's result."""
    total = report.totals
    error = total.changed.relative_error if total.changed else 0.0
    return (
        f"**{spec.model_name} to {spec.quant.name}**: {total.bits_per_weight:.3f} bits per weight,"
        f" {total.ratio:.2f} times smaller, relative error {error:.5f}.\n\nOutput: `{output}`\n\n"
        "Error by layer: Model metrics, `layer/relative_error`. Every tensor: Artifacts, `tensors.json`."
    )
