"""Running jobs. Jobs with the same source share one pass over it, in which every byte is read once.

Passes run one after another on one cluster. A job that fails is left out of the units that follow; the others finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

from jobs.cli.listening import working_on
from jobs.cli.verb import Said, note, show
from jobs.execution.choose import choose, is_local
from jobs.execution.cluster import GO_ON, Cluster, ClusterLost, LocalCluster, UnitFailed
from jobs.execution.merge import job_of, merge
from jobs.execution.run_tasks import run_tasks
from jobs.execution.unit import UnitReport, UnitTask
from jobs.mixed_precision.search import mixed
from jobs.orchestration import already, engine_check
from jobs.orchestration.job import Job, Pass
from jobs.orchestration.needs import check_space, notes_of
from jobs.orchestration.preflight import Planned, plan_job
from jobs.output.life import SignsOfLife
from jobs.report import plan
from jobs.report.document import versions
from jobs.spec.cluster import ClusterSpec
from jobs.spec.job import JobSpec
from jobs.tracking.mlflow_run import warm
from jobs.tracking.recorder import Recorder
from jobs.verification.judging_task import check_can_judge
from loaders.backends import devices_of
from loaders.backends.machine import disk_bytes_fetched, is_contained, max_open_files
from loaders.backends.memory import PeakMemory, no_collection, spared
from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.errors import StorageError, VerifyFailed, WeightmillError
from loaders.storage.settings import use
from loaders.strategies import WeightLoader

# Open files per job of a pass, estimated on the safe side: those of its units in flight, and of its journal. It bounds
# the number of jobs in a pass by the process's limit of open files.
FILES_AT_ONCE = 12
NOTHING_KEPT = "interrupted before a unit was finished: nothing is kept, and the same command begins anew"


@dataclass(frozen=True, kw_only=True)
class Read:
    """The bytes that a pass read."""

    source: str
    jobs: int
    source_bytes: int
    bytes_read: int  # stored bytes, each counted once however many jobs used them
    disk_bytes: int | None  # bytes that the kernel fetched from disks for this process, libraries too; None if unknown
    wall_s: float


def run_job(spec: JobSpec) -> Said:
    """Run a job, or what is left of it. If its output is there already, that is the result.

    Raises:
        WeightmillError: the job failed; its finished units stay for the next attempt.
        KeyboardInterrupt: likewise.
    """
    again = not spec.output.overwrite
    spec = mixed(spec, again=again)
    planned = plan_job(spec, again=again)
    if planned.done is not None:
        report = already.settled(planned)
        return already.said(planned, report, already.track(planned, report))
    if spec.tracking.is_on:
        warm(spec.tracking.uri)
    with engine_check.asking([planned]) as [asked]:
        show(plan.plan_text(spec, planned.plan, planned.target, notes_of(planned), all_tensors=False))
        planned = asked.settled()
    job = Job(1, planned)
    run_pass([job], Clusters())
    assert job.outcome is not None
    if isinstance(job.outcome, WeightmillError):
        raise job.outcome
    return job.outcome


def plan_all(specs: Sequence[tuple[int, JobSpec]]) -> dict[int, Planned | WeightmillError]:
    """Plan numbered jobs; a checkpoint that several read is opened once.

    Nothing is written, except measurements for jobs with quant=auto.
    """
    opened: Callable[..., Checkpoint] = cache(open_checkpoint)
    found: dict[int, Planned | WeightmillError] = {}
    for number, spec in specs:
        use(spec.store_settings)
        try:
            found[number] = plan_job(mixed(spec, again=True), opened, again=True)
        except WeightmillError as error:
            found[number] = error
    planned = {number: plan for number, plan in found.items() if isinstance(plan, Planned)}
    for uri in {each.spec.tracking.uri for each in planned.values() if each.spec.tracking.is_on}:
        warm(uri)
    with engine_check.asking(list(planned.values())) as asked:
        for number, each in zip(planned, asked, strict=True):
            try:
                found[number] = each.settled()
            except WeightmillError as error:
                found[number] = error
    return found


def run_all(groups: Sequence[Sequence[Job]], recorder: Recorder) -> list[Read]:
    """Run planned jobs, pass by pass, and return what each pass read. Every job has an `outcome` afterwards."""
    clusters = Clusters()
    try:
        return [run_pass(group, clusters, recorder) for group in groups]
    finally:
        clusters.close()


def passes(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group jobs into passes: those with the same source, read in the same way, as many as the open files allow."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        spec = job.planned.spec
        source = job.planned.plan.checkpoint.address.real
        how = (
            source,
            spec.source.container,
            spec.unit_mb,
            spec.strategy,
            spec.store,
            spec.output.journal,
            spec.cluster,
        )
        groups.setdefault(how, []).append(job)
    most = max(1, max_open_files() // FILES_AT_ONCE)
    return [group[at : at + most] for group in groups.values() for at in range(0, len(group), most)]


class Clusters:
    """The current cluster, which stays for the next pass if that asks for the same."""

    def __init__(self) -> None:
        self._spec: ClusterSpec | None = None
        self._cluster: Cluster | None = None

    def get(self, spec: ClusterSpec, backends: Collection[str]) -> Cluster:
        """Return the cluster of the settings, for jobs on some backends."""
        if "cuda" in backends and spec.units_at_once is None and is_local(spec):
            spec = spec.model_copy(update={"units_at_once": units_for_gpus(spec, len(devices_of("cuda")))})
        if self._cluster is None or spec != self._spec:
            self.close()
            self._cluster, why = choose(spec)
            self._spec = spec
            if why and spec.kind == "auto" and not self._cluster.is_local:
                note(f"units run on {self._cluster.description}: {why}")
        return self._cluster

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
        self._cluster = None


def units_for_gpus(spec: ClusterSpec, gpus: int) -> int:
    """Return the units at once that keep all GPUs busy: as many as suit the CPUs, and at least two per GPU.

    While one unit of a GPU computes, the other reads or writes.
    """
    return max(LocalCluster(spec).units_at_once, 2 * gpus)


def run_pass(jobs: Sequence[Job], clusters: Clusters, recorder: Recorder | None = None) -> Read:
    """Run the units that have no record, once for all jobs; then check, publish and track each job.

    Raises:
        KeyboardInterrupt: the finished units stay.
    """
    use(jobs[0].planned.spec.store_settings)
    began, started, disk = time.perf_counter(), time.time(), disk_bytes_fetched()
    with spared(), ExitStack() as stack, _stopping(jobs), working_on(*(job.name for job in jobs)):
        for job in jobs:
            with _own_failure(job):
                job.begin(stack, recorder)
        cluster = clusters.get(jobs[0].planned.spec.cluster, {job.planned.backend[0] for job in jobs})
        # Only a sweep has a recorder; otherwise the cluster is this job's alone.
        if recorder is None:
            stack.callback(clusters.close)
        strategy = jobs[0].planned.strategy[0]
        is_needed = not cluster.is_local and any(job.planned.ends_on_the_cluster for job in jobs)
        with _telling(jobs, cluster):
            with PeakMemory() as memory:
                bytes_read = _run_units(jobs, cluster, strategy)
                description = cluster.description
            if recorder is None and not is_needed:
                clusters.close()
            done = Pass(
                started=started,
                wall_s=time.perf_counter() - began,
                peak_bytes=memory.peak_bytes,
                peak_working_set_bytes=memory.peak_working_set_bytes if is_contained() else None,
                cluster=description,
                strategy=strategy.name,
                jobs=len(jobs),
                threads=cluster.threads,
                lanes=cluster.units_at_once if isinstance(cluster, LocalCluster) else 1,
            )
            for job in jobs:
                if job.outcome is None:
                    with _own_failure(job), no_collection(), working_on(job.name):
                        job.finish(done, cluster)
        for job in jobs:
            job.settle()
    plan, after = jobs[0].planned.plan, disk_bytes_fetched()
    fetched = after - disk if after is not None and disk is not None and cluster.is_local else None
    return Read(
        source=str(plan.checkpoint.address),
        jobs=len(jobs),
        source_bytes=plan.source_bytes,
        bytes_read=bytes_read,
        disk_bytes=fetched,
        wall_s=done.wall_s,
    )


@contextmanager
def _telling(jobs: Sequence[Job], cluster: Cluster) -> Iterator[None]:
    """Give signs of life of the jobs during the block."""
    told = [each for job in jobs if (each := job.told) is not None]
    if not told:
        yield
        return
    with SignsOfLife(told, cluster.live.seen, cluster.description, versions()).given():
        yield


@contextmanager
def _own_failure(job: Job) -> Iterator[None]:
    try:
        yield
    except WeightmillError as error:
        job.fail(error)


@contextmanager
def _stopping(jobs: Sequence[Job]) -> Iterator[None]:
    """End the runs of all jobs if the block ends by an error or an interrupt, which then says how to go on."""
    try:
        yield
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        unfinished = [job for job in jobs if job.outcome is None and not (job.is_whole and job.report is not None)]
        for job in unfinished:
            job.stop(killed=killed)
        for job in jobs:
            if job not in unfinished:
                job.settle()
        if killed and len(jobs) == 1:
            kept = jobs[0].planned.journal.count
            raise KeyboardInterrupt(jobs[0].how_to_go_on if kept else NOTHING_KEPT) from None
        if killed:
            done, units = (sum(each) for each in zip(*(job.kept for job in jobs), strict=True))
            raise KeyboardInterrupt(f"interrupted with {done} of {units} units done and kept") from None
        if isinstance(error, ClusterLost):
            done, units = (sum(each) for each in zip(*(job.kept for job in jobs), strict=True))
            raise ClusterLost(f"{error}; {GO_ON}: {done} of {units} units are done") from error
        raise


def _run_units(jobs: Sequence[Job], cluster: Cluster, strategy: WeightLoader) -> int:
    """Run the units that are left of all jobs; returns the stored bytes that were read."""
    if not cluster.is_local:
        for job in (job for job in jobs if job.planned.judging is not None and not job.is_whole):
            with _own_failure(job):
                check_can_judge(cluster, [job.judge_task])
    alive = [job for job in jobs if job.outcome is None]
    check_space([(j.planned, j.planned.journal.taken_bytes) for j in alive if not j.is_whole])
    for job in (j for j in alive if cluster.is_local and not j.is_whole):
        if (shared := job.planned.target.shared) is not None:
            with _own_failure(job):
                job.planned.journal.destination.shared(f"files/{shared.name}", shared.size)
    source = jobs[0].planned.plan.checkpoint.address
    shares = [share for job in alive for share in job.shares()]
    tasks = merge(shares, source, strategy, cluster.threads, in_place=cluster.is_local)
    # The sort is stable: units keep their order, except those with tensors that strategy=streaming reads first.
    tasks.sort(key=lambda task: min(strategy.priority(s.name) for r in task.unit.tensors for _, s in r.stored))
    for job in alive:
        job.run.watch(cluster.live.seen)
    counts = {job.run.count for job in alive}  # of a sweep's jobs all the same one

    def count(size: int) -> None:
        for each in counts:
            each(size)

    by_number, by_task, read = {job.number: job for job in jobs}, {task.unit.id: task for task in tasks}, 0
    specs = [spec for task in tasks for tensor in task.unit.tensors for _, spec in tensor.stored]
    with (
        strategy.ahead(jobs[0].planned.plan.checkpoint.source, specs) if cluster.is_local else nullcontext(),
        closing(run_tasks(cluster, tasks, "quantizing", sum(task.work_bytes for task in tasks), count)) as outcomes,
    ):
        for outcome in outcomes:
            read += _take(outcome, by_task[outcome.unit], by_number)
            if all(job.outcome is not None for job in jobs):
                break
    return read


def _take(outcome: UnitReport | UnitFailed, task: UnitTask, jobs: dict[int, Job]) -> int:
    """Give a unit's records, or its failures, to their jobs; returns the stored bytes that the unit read."""
    for name, share in task.shares.items():
        job = jobs[job_of(name)]
        if job.outcome is not None:
            continue
        with _own_failure(job):
            job.run.check()
            if isinstance(outcome, UnitFailed):
                raise StorageError(f"{outcome.unit}: {outcome.reason}")
            if name in outcome.failures:
                raise VerifyFailed(f"not published: {outcome.failures[name]}")
            if name in outcome.done:
                job.done[share.unit.id] = outcome.done[name]
                job.retries += outcome.attempts - 1
    return 0 if isinstance(outcome, UnitFailed) else outcome.load.bytes
