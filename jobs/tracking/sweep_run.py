"""A sweep's own run in MLflow, beside the runs of its jobs: their table, a picture, the sweep's page, links to them.

The runs of jobs are no children of it: MLflow's charts leave out nested runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from jobs.report.comparison import BITS, ComparedJob, Comparison
from jobs.report.pictures import size_and_error
from jobs.spec.tracking import TrackingSpec
from jobs.tracking.job_run import shown_by_mlflow
from jobs.tracking.mlflow_run import KIND, TRAINING, Source
from jobs.tracking.pages import sweep_view
from jobs.tracking.recorder import Recorder
from jobs.tracking.run import Run, open_run
from jobs.tracking.sweep_tag import SWEEP
from loaders.storage.hashes import text_digest
from loaders.words import counted

PAGE = "report.html"


def open_sweep_run(
    spec: TrackingSpec, root: Path, sweep: str, request: Sequence[str], told: Sequence[Mapping[str, str]],
    sources: Sequence[Source], recorder: Recorder, *, is_done: bool,
) -> Run:  # fmt: skip
    """Open the run of a sweep: a new one, or that of a stopped one; of a sweep whose jobs are all done, its last one.

    `told` are the facts of its jobs, by which people filter runs.

    Raises:
        StorageError: the tracking server does not answer.
    """
    facts = {name: ", ".join(sorted({each[name] for each in told})) for name in (told[0] if told else ())}
    tags = {**facts, KIND: "sweep", SWEEP: sweep, **shown_by_mlflow()}
    params = {**facts, "sweep.jobs": len(told), "sweep.request": " ".join(request)}
    key = text_digest(f"sweep {sweep} {root}")
    return open_run(spec, root, sweep, params, tags, key, recorder, sources=sources, is_published=is_done)


def track_sweep(run: Run, sweep: str, by_source: Mapping[str, Comparison], page: bytes) -> None:
    """Log a finished sweep."""
    jobs = [job for compared in by_source.values() for job in compared.jobs]
    done = [job for job in jobs if job.status == "done"]
    best = {f"best/{c.error}": min(_values(c), default=None) for c in by_source.values()}
    run.metrics(
        {"jobs/total": len(jobs), "jobs/done": len(done), "jobs/failed": len(jobs) - len(done)}
        | {name: value for name, value in best.items() if value is not None}
    )
    run.describe(lambda experiment: _description(sweep, by_source, experiment))
    run.table("jobs.json", _columns(by_source))
    run.texts(lambda: {PAGE: page.decode(), **_pictures(by_source)})
    if by_source:
        run.view(sweep, sweep_view(sweep, BITS, next(iter(by_source.values())).error))


def _values(compared: Comparison) -> list[float]:
    return [job.metrics[compared.error] for job in compared.jobs if compared.error in job.metrics]


def _pictures(by_source: Mapping[str, Comparison]) -> dict[str, str]:
    drawn = [size_and_error(each.jobs, each.front, each.error) for each in by_source.values()]
    found = [svg for svg in drawn if svg is not None]
    return {f"pareto{'' if not index else f'_{index + 1}'}.svg": svg for index, svg in enumerate(found)}


def _columns(by_source: Mapping[str, Comparison]) -> dict[str, list[str]]:
    """Return the table of jobs, by column; of several sources, a column says which."""
    rows = [(source, compared, job) for source, compared in by_source.items() for job in compared.jobs]
    titles = list(dict.fromkeys(title for compared in by_source.values() for title in compared.titles))
    cells = [dict(zip(compared.titles, compared.cells(job), strict=True)) for _, compared, job in rows]
    return {
        "job": [job.name for _, _, job in rows],
        "status": [job.status_text for _, _, job in rows],
        "Pareto front": ["*" if job.name in compared.front else "" for _, compared, job in rows],
        **({"source": [source for source, _, _ in rows]} if len(by_source) > 1 else {}),
        **{title: [each.get(title, "") for each in cells] for title in titles},
        "output": [job.output or "" for _, _, job in rows],
        "run": [job.run_id or "" for _, _, job in rows],
    }


def _description(sweep: str, by_source: Mapping[str, Comparison], experiment: str) -> str:
    lines = []
    for source, compared in by_source.items():
        lines += [f"{counted(len(compared.jobs), 'job')} of `{source.replace('`', chr(39))}`", ""]
        lines += ["| job | status | bits per weight | " + compared.error + " | |", "|---|---|---|---|---|"]
        lines += [_row(job, compared, experiment) for job in compared.jobs] + [""]
    view = f"#/experiments/{experiment}/runs?{TRAINING}&compareRunsMode=CHART&viewStateShareKey={quote(sweep)}"
    return "\n".join(
        [
            *lines,
            f"[Compare them]({view}). All of it on a page: Artifacts, `{PAGE}`; as a table: Artifacts, `jobs.json`.",
        ]
    )


def _row(job: ComparedJob, compared: Comparison, experiment: str) -> str:
    name = job.name.replace("|", "").replace("[", "").replace("]", "").replace("<", "&lt;")
    if job.run_id is not None:
        name = f"[{name}](#/experiments/{experiment}/runs/{job.run_id}?{TRAINING})"
    numbers = [f"{job.metrics[m]:.5g}" if m in job.metrics else "" for m in (BITS, compared.error)]
    front = "Pareto front" if job.name in compared.front else ""
    return f"| {name} | {job.status} | {numbers[0]} | {numbers[1]} | {front} |"
