"""A job's run in MLflow: its parameters, tags, metrics and artifacts."""

from __future__ import annotations

import calendar
import getpass
import math
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jobs.mixed_precision.allocation import mix_document
from jobs.output.journal import Journal
from jobs.output.report import Report
from jobs.planning.plan import Plan, TargetPlan
from jobs.planning.targets import Target, target_of
from jobs.report.document import versions
from jobs.report.metrics import error_by_layer, metrics, table_columns
from jobs.report.pictures import pictures
from jobs.report.plan import output_sizes
from jobs.spec.job import JobSpec
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.mlflow_run import KIND, BackgroundRun, Source
from jobs.tracking.recorder import Recorder
from jobs.tracking.run import Run, open_run
from jobs.tracking.sweep_tag import SWEEP
from loaders.places import ROOT
from loaders.presets.auto import AutoQuant
from loaders.storage.address import Address
from loaders.storage.base import OUR_PAGE, OUR_REPORT
from loaders.storage.hashes import text_digest
from loaders.words import shown

CHOSEN = "quant.chosen."  # the mix, which lists every tensor: too long for parameters, it is logged as an artifact
# Names of schemes' engines, and of layouts where nothing is quantized, that are known by others.
ENGINES = {"ggml": "llama.cpp", "gguf": "llama.cpp", "mlx": "mlx-lm", "hf": "transformers"}
LONGEST = 200  # characters of a stranger's text in a tag


def open_job_run(
    spec: JobSpec, plan: Plan, target: TargetPlan, journal: Journal, recorder: Recorder | None, *, sweep: str | None,
    number: int, is_published: bool = False,
) -> Run:  # fmt: skip
    """Open a job's run: a new one, or the one that an interrupted attempt with the same key left.

    Raises:
        StorageError: the tracking server does not answer.
    """
    told = facts(spec, plan, target)
    params = _params(told, spec.resolved(), versions())
    tags = {**_tags(told, str(journal.output)), **sweep_tags(sweep, number)}
    root, name = spec.output.local_root, spec.output_address.name
    return open_run(
        spec.tracking, root, name, params, tags, run_key(journal), recorder, sources=[source_of(spec, plan)],
        is_published=is_published,
    )  # fmt: skip


def open_past_run(
    tracking: TrackingSpec, spec: JobSpec, root: Path, report: Report, key: str, output: str
) -> BackgroundRun:  # fmt: skip
    """Open the run of a job that ended before: the one with its key, however far that came, or a new one.

    `root` is the folder of the default store.

    Raises:
        StorageError: the tracking server does not answer.
    """
    told, began, source = past_facts(spec, report), _began(report), report.source
    sweep = {} if report.run.sweep is None else {SWEEP: report.run.sweep}
    name = shown(spec.model_name)[:LONGEST]
    profile = {"parameters": report.totals.parameters, "bytes": report.run.bytes, "files": len(source.files)}
    run = open_run(
        tracking,
        root,
        Address.of(output).name,
        _params(told, report.run.request, report.versions),
        {**_tags(told, output), **sweep},
        key,
        sources=[Source(name=name, digest=source.fingerprint, address=Address.of(source.path), profile=profile)],
        is_published=True,
        past=(began, began + report.run.wall_s),
    )
    assert isinstance(run, BackgroundRun), "tracking is on"
    return run


def _began(report: Report) -> float:
    return calendar.timegm(time.strptime(report.run.started, "%Y-%m-%dT%H:%M:%SZ"))


def _params(told: Mapping[str, str], request: Mapping[str, Any], made_by: Mapping[str, str]) -> dict[str, Any]:
    asked = {k: v for k, v in flat(request) if v is not None and not k.startswith(CHOSEN)}
    return {**told, **asked, **{f"version.{name}": version for name, version in made_by.items()}}


def _tags(told: Mapping[str, str], output: str) -> dict[str, str]:
    return {**told, KIND: "job", "weightmill.output": output, **shown_by_mlflow()}


def facts(spec: JobSpec, plan: Plan, target: TargetPlan) -> dict[str, str]:
    """Return what people filter runs by, which are parameters and tags of every job.

    `bits` are whole bits of a quantized weight, without its share of scales; of all weights if none is quantized.
    """
    quantized = [d for d in target.decisions if d.action == "quantize"]
    engines = {d.scheme.engine for d in quantized if d.scheme is not None}
    sizes = output_sizes(target)
    counted = [d for d in quantized or target.decisions if d.tensor.name in sizes]
    stored = sum(sizes[d.tensor.name] for d in counted)
    weights = sum(math.prod(d.tensor.shape) for d in counted)
    return _facts(spec, target.target, plan.checkpoint.config.get("model_type"), engines, stored * 8 // max(1, weights))


def past_facts(spec: JobSpec, report: Report) -> dict[str, str]:
    """Return the facts of a job that ended before, as far as its report and its request tell: without its source."""
    quantized = [tensor for tensor in report.tensors if tensor.action == "quantize"]
    counted = quantized or list(report.tensors)
    stored = sum(tensor.output_bytes for tensor in counted)
    weights = sum(math.prod(tensor.shape) for tensor in counted)
    engines = {spec.quant.scheme.engine} if quantized and spec.quant.scheme is not None else set()
    return _facts(spec, target_of(spec), report.source.model_type, engines, stored * 8 // max(1, weights))


def _facts(spec: JobSpec, target: Target, model_type: Any, engines: Collection[str], bits: int) -> dict[str, str]:
    engine = min(engines, default=target.layout.name)
    return {
        "model": shown(spec.model_name)[:LONGEST],
        "model_type": shown(model_type)[:LONGEST] if isinstance(model_type, str) else "unknown",
        "engine": ENGINES.get(engine, engine),
        "container": target.container.name,
        "quant": spec.quant.name,
        "bits": str(bits),
    }


def source_of(spec: JobSpec, plan: Plan) -> Source:
    """Return a job's source as a run has it."""
    checkpoint = plan.checkpoint
    profile = {"parameters": plan.parameters, "bytes": plan.source_bytes, "files": len(checkpoint.files)}
    name = shown(spec.model_name)[:LONGEST]
    return Source(name=name, digest=checkpoint.fingerprint, address=checkpoint.address, profile=profile)


def run_key(journal: Journal) -> str:
    """Return the key of a job in MLflow: a digest of its plan and its output's address."""
    return text_digest(f"{journal.key} {journal.output}")


def track_job(
    run: Run, spec: JobSpec, target: TargetPlan, output: Address, report: Report, plan: Mapping[str, Any],
    told: Mapping[str, str], page: bytes,
) -> None:  # fmt: skip
    """Log a finished job's report, plan and page, and link its output."""
    track_report(run, spec, output, report, page)
    run.document("plan.json", plan)
    if isinstance(spec.quant, AutoQuant):
        run.document("mix.json", mix_document(spec.quant, target.decisions))
    run.output(output.name, str(output), told, spec.tracking.register)


def track_report(run: Run, spec: JobSpec, output: Address, report: Report, page: bytes | None) -> None:
    """Log what a finished job's report and page tell."""
    run.describe(_description(spec, output, report))
    run.metrics(metrics(report))
    run.series("layer/relative_error", [(layer, e.relative_error) for layer, e in error_by_layer(report).items()])
    run.table("tensors.json", table_columns(report))
    run.document(OUR_REPORT, report.to_json())
    shown_page = {} if page is None else {OUR_PAGE: page.decode(errors="replace")}
    run.texts(lambda: {**shown_page, **{f"{name}.svg": svg for name, svg in pictures(report).items()}})


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
def shown_by_mlflow() -> dict[str, str]:
    """Return the tags from which MLflow's pages show who made a run, and with what program."""
    found = {"mlflow.source.name": "weightmill run", "mlflow.source.type": "LOCAL"}
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
        f" {total.ratio:.2f} times smaller, relative error of what changed {error:.5f}.\n\nOutput: `{output}`\n\n"
        f"All of it on a page: Artifacts, `{OUR_PAGE}`. Error by layer: Model metrics, `layer/relative_error`. Every"
        " tensor: Artifacts, `tensors.json`."
    )
