"""Sweeps: composing all jobs, refusing combinations that cannot be run, running the passes, and comparing the results.

A sweep is identified by its request. The same command resumes it, with the same job numbers and the same tag in MLflow,
and skips jobs whose outputs exist.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Group, RenderableType
from rich.text import Text

from jobs.cli.compose import Request
from jobs.cli.multirun import Composed, Together, sweep
from jobs.cli.program import program
from jobs.cli.validation import check
from jobs.cli.verb import DONE, FAILED, WRONG, Said, note
from jobs.orchestration import already
from jobs.orchestration.job import Job
from jobs.orchestration.preflight import Planned
from jobs.orchestration.refusals import Refused, refusal
from jobs.orchestration.source_pass import Read, passes, plan_all, run_all
from jobs.output.report import Report
from jobs.report import tables
from jobs.report.comparison import ComparedJob, compared_job, model_of, to_json
from jobs.report.comparisons import Comparisons
from jobs.report.document import job_document
from jobs.report.metrics import metrics, quality_metrics
from jobs.report.sweep_page import make_sweep_page
from jobs.spec.base import OUTPUTS
from jobs.spec.job import JobSpec
from jobs.tracking.job_run import facts, run_key, source_of, sweep_tags
from jobs.tracking.pages import compare_page
from jobs.tracking.recorder import Recorder
from jobs.tracking.run import Run, untracked
from jobs.tracking.sources import Known, located
from jobs.tracking.sweep_run import open_sweep_run, track_sweep
from loaders.errors import BadSpec, StorageError, WeightmillError, io_errors
from loaders.storage.address import Address
from loaders.storage.atomic import write_file
from loaders.storage.base import OUR_PAGE
from loaders.storage.hashes import text_digest
from loaders.storage.settings import use
from loaders.words import counted, in_a_line

UNKNOWN_KEY = re.compile(r"([\w.]+): unknown key")


def run_sweep(config: str, request: Request, compose_all: Callable[[str, Request, Together], None] = sweep) -> Said:
    """Run a sweep, by default through Hydra.

    Raises:
        BadSpec: some combinations cannot be run; nothing was started.
        KeyboardInterrupt: the finished units stay.
    """
    under_way = Sweep(request)
    try:
        _run(under_way, config, request, compose_all)
        return under_way.said()
    finally:
        under_way.close()


def _run(
    under_way: Sweep, config: str, request: Request, compose_all: Callable[[str, Request, Together], None]
) -> None:
    try:
        compose_all(config, request, under_way.together)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{str(error) or 'interrupted'}: {under_way.state}; the same command goes on") from None
    except WeightmillError as error:
        # A sweeper that searches may give up over a failed job. That job's error is in the results already, so the
        # sweep ends with its table; any other error is the sweep's own.
        if not any(error is each for each in under_way.outcomes.values()):
            raise


class Sweep:
    """A running sweep, over all batches of jobs that its sweeper makes."""

    def __init__(self, request: Request) -> None:
        self.request = request
        # The current folder is part of the identity, since relative paths in the request depend on it.
        self.id = f"sweep-{text_digest(f'{Path.cwd()} {sorted(request.given)}')[:12]}"
        self.outcomes: dict[int, Said | WeightmillError] = {}
        self._specs: dict[int, JobSpec] = {}
        self._located: Known = {}  # so that `latest` is the same model for all jobs, however long a search takes
        self._reports: dict[int, Report] = {}
        self._names: dict[int, str] = {}
        self._run_ids: dict[int, str | None] = {}
        self._reads: list[Read] = []
        self._repeats: dict[int, int] = {}  # jobs that a search tried again, with the number of the first equal one
        self._recorder = Recorder()
        self._sources: dict[int, str] = {}
        self._run_of_all: Run | None = None  # until it has ended

    # --- a batch

    def together(self, composed: Sequence[Composed], searches: bool) -> list[Any]:
        """Run a batch; returns each job's objective, or its error if the sweeper searches."""
        self._names |= {job.number: job.name for job in composed}
        refused = self._check(composed)
        again = self._tried_before(composed) if searches else {}
        fresh = [job for job in composed if job.number in self._specs and job.number not in again]
        refused += self._same_place(fresh)
        planned = plan_all([(j.number, self._specs[j.number]) for j in fresh])
        for job in composed:
            plan = planned.get(job.number)
            if isinstance(plan, BadSpec):
                refused += [Refused(job, problem) for problem in plan.problems]
            elif isinstance(plan, WeightmillError):
                self.outcomes[job.number] = plan
        if refused and not searches:
            bad = {each.job.number for each in refused}
            raise refusal(refused, [job for job in composed if job.number not in bad], self.request)
        for each in refused:
            self.outcomes[each.job.number] = BadSpec(each.problem)
        self._run({n: p for n, p in planned.items() if isinstance(p, Planned) and n not in self.outcomes})
        self.outcomes |= {number: self.outcomes[first] for number, first in again.items()}
        self._reports |= {n: self._reports[first] for n, first in again.items() if first in self._reports}
        self._repeats |= again
        return [self._result(job.number, searches) for job in composed]

    def _tried_before(self, composed: Sequence[Composed]) -> dict[int, int]:
        """Return the jobs that a search tries again, with the numbers of the first equal jobs."""
        wanted = {number: json.dumps(spec.resolved()) for number, spec in self._specs.items()}
        first = {text: number for number, text in sorted(wanted.items(), reverse=True)}
        mine = [job.number for job in composed if job.number in wanted]
        return {number: first[wanted[number]] for number in mine if first[wanted[number]] != number}

    def _check(self, composed: Sequence[Composed]) -> list[Refused]:
        """Validate every job's values; returns the jobs that are refused."""
        refused, notes = [], dict[str, None]()
        for job in composed:
            values = deepcopy(job.values)
            output = values.get("output")
            if isinstance(output, dict) and output.get("path") is None:
                named, suffix = [*job.named, *self.request.typed_for(values)], output.get("suffix", "") + job.suffix
                values["output"] = {**output, "suffix": suffix, "named": named}
            try:
                spec = check(JobSpec, deepcopy(values), tell=notes.setdefault)
                use(spec.store_settings)
                self._specs[job.number] = located(spec, notes.setdefault, self._located)
            except BadSpec as error:
                refused += [Refused(job, problem, _cure(values, problem, error)) for problem in error.problems]
        for each in notes:
            note(each)
        return refused

    def _same_place(self, composed: Sequence[Composed]) -> list[Refused]:
        """Refuse jobs that would write to the address of an earlier job's output, or all to one path."""
        places: dict[Address, list[Composed]] = {}
        for job in composed:
            places.setdefault(self._specs[job.number].output_address.real, []).append(job)
        refused = []
        for path, jobs in places.items():
            is_given = self._specs[jobs[0].number].output.path is not None and "output.path" not in jobs[0].varied
            if len(jobs) > 1 and is_given:
                problem = f"output.path: {path} is one output, and these are {len(jobs)} jobs; give output.root={path}"
                refused += [Refused(job, f"{problem}, in which each has a folder") for job in jobs]
                continue
            problem = f"output.path: {path} is also that of {jobs[0].name}; give each a name or a path of its own"
            refused += [Refused(job, problem) for job in jobs[1:]]
        return refused

    def _run(self, planned: dict[int, Planned]) -> None:
        old = {n: p for n, p in planned.items() if p.done is not None}
        self._sources |= {number: str(plan.plan.checkpoint.address) for number, plan in planned.items()}
        for line in dict.fromkeys(line for plan in planned.values() for line in untracked(plan.spec.tracking)):
            note(line)
        self._begin(planned)
        adopted: dict[int, Future[str | None]] = {}
        for number, plan in old.items():
            try:
                report = already.settled(plan)
                registered = already.register(plan, self._recorder)
            except WeightmillError as error:
                self.outcomes[number] = error
                continue
            self.outcomes[number] = already.said(plan, report, registered)
            self._reports[number] = report
            tracking, root = plan.spec.tracking, plan.spec.output.local_root
            if tracking.is_on:
                judged = {} if plan.judging is None else quality_metrics(report.quality)
                tags = sweep_tags(self.id, number)
                adopted[number] = self._recorder.adopt(tracking, root, run_key(plan.journal), tags, judged)
        jobs = [
            Job(number, plan, self.id, self._names[number]) for number, plan in planned.items() if number not in old
        ]
        groups = passes(jobs)
        note(
            f"{self.id}: {counted(len(planned), 'job')}, {len(old)} of them done before;"
            f" {counted(len(groups), 'pass', 'passes')} over the sources"
        )
        for group in groups:
            source = group[0].planned.plan
            size = tables.size(source.source_bytes)
            note(f"  {source.checkpoint.address}, {size}: {', '.join(j.planned.journal.output.name for j in group)}")
        self._warn({number: planned[number] for number in planned if number not in old})
        self._reads += run_all(groups, self._recorder)
        for job in jobs:
            assert job.outcome is not None
            self.outcomes[job.number] = job.outcome
            if job.report is not None:
                self._reports[job.number] = job.report
            self._run_ids[job.number] = job.run.run_id
            if isinstance(job.outcome, Said):
                job.outcome.then()
        for number, found in adopted.items():
            self._run_ids[number] = found.result() if found.exception() is None else None

    def _warn(self, planned: Mapping[int, Planned]) -> None:
        """Say what plans warn of, before the work; what several warn of in the same words, once."""
        of: dict[str, list[str]] = {}
        for plan in planned.values():
            for warning in plan.target.warnings:
                of.setdefault(warning, []).append(plan.journal.output.name)
        for warning, names in of.items():
            note(in_a_line(f"warning: {'' if len(names) == len(planned) else ', '.join(names) + ': '}{warning}"))

    def _begin(self, planned: dict[int, Planned]) -> None:
        """Open the sweep's own run, before those of its jobs, if there is one to track."""
        tracked = [plan for plan in planned.values() if plan.spec.tracking.is_on]
        if self._run_of_all is not None or not tracked:
            return
        first, is_done = tracked[0].spec, all(plan.done is not None for plan in tracked)
        self._run_of_all = open_sweep_run(
            first.tracking, first.output.local_root, self.id, sorted(self.request.given),
            [facts(plan.spec, plan.plan, plan.target) for plan in tracked],
            list({self._sources[n]: source_of(p.spec, p.plan) for n, p in planned.items()}.values()),
            self._recorder, is_done=is_done,
        )  # fmt: skip

    def _result(self, number: int, searches: bool) -> Any:
        outcome = self.outcomes[number]
        if isinstance(outcome, WeightmillError):
            return outcome if searches else None
        values = metrics(self._reports[number])
        found = tuple(values[name] for name in self._specs[number].objective)
        return found[0] if len(found) == 1 else found

    def close(self) -> None:
        """End the sweep's run, which is killed if nothing was said of it, and wait until everything is logged."""
        if self._run_of_all is not None:
            self._run_of_all.end("KILLED")
        self._recorder.close()

    @property
    def state(self) -> str:
        done = sum(isinstance(outcome, Said) for outcome in self.outcomes.values())
        return f"{done} of {len(self._names)} jobs are done"

    # --- the end

    def said(self) -> Said:
        """Return the sweep's result: the table of jobs, the Pareto front, and the page in MLflow."""
        candidates = [self._candidate(number) for number in sorted(self._names) if number not in self._repeats]
        compared = Comparisons(candidates)
        models = compared.document(0)
        page, written = self._page(), self._finish(compared)
        reads: list[RenderableType] = [
            f"{read.source}: {tables.size(read.bytes_read)} read of {tables.size(read.source_bytes)} for"
            f" {counted(read.jobs, 'job')} in {read.wall_s:.2f} s"
            + (", once" if read.bytes_read <= read.source_bytes else ", under two sets of names, each once")
            + (f"; the kernel fetched {tables.size(read.disk_bytes)} from disks" if read.disk_bytes is not None else "")
            for read in self._reads
        ]
        failed = [n for n, outcome in sorted(self.outcomes.items()) if isinstance(outcome, WeightmillError)]
        if self._repeats:
            reads.append(f"{len(self._repeats)} of {len(self._names)} trials were of a job that was done already")
        said = {n: in_a_line(f"FAILED job {n}, {self._names[n]}: {self.outcomes[n]}") for n in failed}
        faults = [Text(said[n], style="bold red") for n in failed]
        pages: list[RenderableType] = [tables.whole(f"page: {written}"), *([tables.whole(page)] if page else [])]
        text = Group(
            f"{counted(len(candidates), 'job')}:", *compared.lines(), *reads, *faults, *self._places(), *pages,
            *_to_compare(candidates),
        )  # fmt: skip
        document = {
            "status": "failed" if failed else "done",
            "sweep": self.id,
            "jobs": [self._document(number) for number in sorted(self._names)],
            "error": " ".join(dict.fromkeys(model["error"] for model in models)),
            "pareto": compared.front,
            "models": [{key: model[key] for key in ("source", "error", "jobs", "pareto")} for model in models],
            "candidates": [to_json(candidate) for candidate in candidates],
            "passes": [asdict(read) for read in self._reads],
            "compare": page,
            "page": str(written),
        }
        outcomes = {self._names[number]: outcome for number, outcome in sorted(self.outcomes.items())}
        return Said(document, text, self._status(), value=outcomes)

    def _finish(self, compared: Comparisons) -> Path:
        """Write the sweep's page beside its outputs, and track the sweep; returns where the page is.

        Raises:
            StorageError: the page cannot be written.
        """
        root = next(iter(self._specs.values())).output.local_root if self._specs else Path.cwd() / OUTPUTS
        done = {each.name: each.output for each in compared.jobs if each.status == "done" and each.output}
        outputs = {name: Address.of(output) for name, output in done.items()}
        links = {name: page_of(output, root) for name, output in outputs.items() if output.is_local}
        page, path = make_sweep_page(self.id, compared.of, links), root / f"{self.id}.html"
        with io_errors("making", root):
            root.mkdir(parents=True, exist_ok=True)
        write_file(path, page)
        if self._run_of_all is not None:
            track_sweep(self._run_of_all, self.id, compared.of, page)
            status, run, self._run_of_all = self._status(), self._run_of_all, None
            try:
                run.close("FINISHED" if status == DONE else "FAILED")
            except StorageError as error:
                note(f"the sweep's own run: {error}")
        return path

    def _status(self) -> int:
        """Return the worst exit status of the jobs."""
        found = [
            outcome.status if isinstance(outcome, Said) else WRONG if isinstance(outcome, BadSpec) else FAILED
            for outcome in self.outcomes.values()
        ]
        return max(found, default=DONE)

    def _candidate(self, number: int) -> ComparedJob:
        outcome, output = self.outcomes[number], self._specs[number].output_address if number in self._specs else None
        name = self._names[number] if output is None else output.name
        run_id = self._run_ids.get(number)
        if isinstance(outcome, Said):
            return compared_job(name, self._reports[number], run_id, str(output))
        return ComparedJob(
            name=name, status="failed", metrics={}, run_id=run_id, output=str(output), why=str(outcome).splitlines()[0],
            source=model_of(self._specs[number].resolved()) if number in self._specs else "",
        )  # fmt: skip

    def _document(self, number: int) -> dict[str, Any]:
        outcome, about = self.outcomes[number], {"number": number, "varied": self._names[number]}
        if isinstance(outcome, Said):
            return {**outcome.document, **about}
        problems = list(outcome.problems) if isinstance(outcome, BadSpec) else [str(outcome)]
        status = WRONG if isinstance(outcome, BadSpec) else FAILED
        job = job_document(self._specs[number]) if number in self._specs else None  # what could not even be checked
        return {"status": "failed", "exit_status": status, "problems": problems, "job": job, **about}

    def _places(self) -> list[RenderableType]:
        """Say where the outputs are: in which folder they lie, or each place if these are several."""
        done = [n for n, outcome in sorted(self.outcomes.items()) if isinstance(outcome, Said) and n in self._specs]
        parents = dict.fromkeys(self._specs[number].output_address.parent for number in done)
        where = ", ".join(str(parent) for parent in parents)
        has_cards = all(self._specs[number].output.card for number in done)
        how = "; the README.md of each says how to load it" if has_cards else ""
        return [tables.whole(f"outputs: {where}{how}")] if parents else []

    def _page(self) -> str | None:
        """Return the page on which MLflow compares the runs; None if no run is tracked."""
        ids = [run for _, run in sorted(self._run_ids.items()) if run is not None]
        spec = next((s for s in self._specs.values() if s.tracking.is_on), None)
        if not ids or spec is None:
            return None
        experiment = self._recorder.experiment_of(spec.tracking)
        return compare_page(spec.tracking, spec.output.local_root, ids, experiment, self.id)


def _cure(values: dict[str, Any], problem: str, error: BadSpec) -> str | None:
    """Return the key without which a job would be valid, if its only fault is a key that its scheme does not know."""
    match = UNKNOWN_KEY.match(problem)
    if match is None or len(error.problems) > 1:
        return None
    *parents, leaf = match[1].split(".")
    left = deepcopy(values)
    holder = left
    for parent in parents:
        holder = holder[parent]
    del holder[leaf]
    try:
        check(JobSpec, left)
    # The job has more faults than that key.
    except BadSpec:
        return None
    return match[1]


def _to_compare(candidates: Sequence[ComparedJob]) -> list[RenderableType]:
    """Return the command that compares the outputs, tracked or not, if these are several."""
    outputs = [job.output for job in candidates if job.status == "done" and job.output]
    return [tables.whole(f"compare them: {program()} {shlex.join(['compare', *outputs])}")] if len(outputs) > 1 else []


def page_of(output: Address, root: Path) -> str:
    """Return the address of an output's page, as a page in `root` leads to it."""
    return quote(os.path.relpath(output.path / OUR_PAGE, root))
