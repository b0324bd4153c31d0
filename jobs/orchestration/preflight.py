"""The preflight of a job: its exact plan, and all checks that need no weights. Nothing is written."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.execution.choose import is_local
from jobs.execution.cluster import LocalCluster
from jobs.execution.unit import staging_bytes
from jobs.output.destination import check_free, check_place
from jobs.output.journal import Journal
from jobs.output.publish import is_published
from jobs.output.report import Report, read_report
from jobs.planning.build import make_plan
from jobs.planning.plan import Plan, TargetPlan, Unit
from jobs.planning.targets import TARGET, target_of
from jobs.planning.work_key import work_key
from jobs.report import tables
from jobs.report.document import job_document
from jobs.spec.job import JobSpec, LogitsSpec
from jobs.spec.strategy import reading
from jobs.verification.logits import Judging, judging_of
from loaders.backends import check_backend, may_differ
from loaders.backends.fastest import fastest
from loaders.backends.memory import no_collection
from loaders.checkpoints.checkpoint import Checkpoint, open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec, StorageError
from loaders.lint import Finding
from loaders.storage import open_store
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT
from loaders.storage.local import device_of, free_bytes
from loaders.strategies import WeightLoader
from loaders.strategies.base import Use
from loaders.tensors.encoding import Encoding
from loaders.tensors.uses import uses_of
from loaders.words import counted

LEVELS = 6  # of the key of a job: its work, an assembly of it, the assembly's fields, and in them each file
MB = 1_000_000
SPARE_BYTES = 16 << 20  # free bytes that an output needs besides its planned files: config, index, records


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A job and its plan."""

    spec: JobSpec
    plan: Plan
    journal: Journal
    done: Report | None = None  # the report of an earlier run of this very job, if the job need not run again
    judging: Judging | None = None  # the planned evaluation, with verify=logits
    findings: tuple[Finding, ...] = ()  # what the engine's own code found, where it was asked

    @property
    def target(self) -> TargetPlan:
        return self.plan.targets[TARGET]

    @property
    def scratch_bytes(self) -> int:
        """The bytes that the disk holds twice while pieces of other processes are joined: those of one piece."""
        is_in_place = is_local(self.spec.cluster) and self.journal.destination.is_local
        return 0 if is_in_place else max((piece.size for piece in self.target.pieces), default=0)

    @cached_property
    def strategy(self) -> tuple[WeightLoader, str]:
        """The strategy that reads the source, and the reason."""
        return reading(self.spec.strategy, self.plan.checkpoint)

    @cached_property
    def backend(self) -> tuple[str, str]:
        """The backend on which encoders run, and the reason."""
        return backend_of(self.spec, self.target)


def plan_job(
    spec: JobSpec, opened: Callable[[Address, str], Checkpoint] = open_checkpoint, *, again: bool = False
) -> Planned:
    """Plan a job from headers, and check its rules, its sizes and its output's address. Nothing is written.

    With `again`, an output that this very job made before is accepted: see `Planned.done`.

    Raises:
        BadSpec: the job cannot be done; all faults of one kind at once.
        BadCheckpoint: the source is damaged.
    """
    output = spec.output_address
    check_place(spec, output)
    if not again:
        check_free(spec, output)
    target = target_of(spec)
    # Raises BadSpec now if the backend does not exist, and not in the first unit.
    check_backend(spec.backend.asked)
    with no_collection():
        checkpoint = opened(spec.source_address, spec.source.container)
        plan = make_plan(checkpoint, [target], spec.unit_mb)
    made = plan.targets[TARGET]
    # The key covers everything that determines the output's bytes: the units' work, the config, and files made from
    # metadata. Another key means another journal, so a changed request never resumes old work.
    backend = _of_the_bytes(made, spec.backend.kind)
    units = [unit.key(TARGET) for unit in plan.units]
    key = work_key(units, made.config, made.assembly, made.made, *backend, levels=LEVELS)
    planned = Planned(spec=spec, plan=plan, journal=Journal(output, key))
    _ = planned.strategy  # the property raises BadSpec for a strategy that cannot read this source
    if again and (done := _done_before(planned)) is not None:
        return replace(planned, done=done)
    if again:
        check_free(spec, output)
    if isinstance(spec.verify, LogitsSpec):
        return replace(planned, judging=judging_of(spec.verify, plan, made, output))
    return planned


def _of_the_bytes(target: TargetPlan, backend: str) -> list[str]:
    """Return the backend if the output's bytes may depend on it, else nothing."""
    schemes = {decision.scheme for decision in target.decisions if decision.scheme is not None}
    return [backend] if may_differ(schemes, backend) else []


def backend_of(spec: JobSpec, target: TargetPlan) -> tuple[str, str]:
    """Return the backend on which a job's encoders run, and the reason; `auto` is measured for the job's own scheme."""
    if spec.backend.kind != "auto":
        return spec.backend.kind, "as asked"
    if not is_local(spec.cluster):
        return "cpu", "nothing is measured on the cluster's machines; backend=cuda asks for their GPUs"
    sizes = Counter[str]()
    for decision in target.decisions:
        if decision.scheme == spec.quant.scheme:
            sizes[decision.tensor.dtype.name] += decision.tensor.source_bytes
    [(dtype, _)] = sizes.most_common(1) or [("BF16", 0)]
    return fastest(spec.quant.scheme, dtype, sizes.total(), LocalCluster(spec.cluster).threads)


def _done_before(planned: Planned) -> Report | None:
    """Return the report of the existing output, if this very job made it from this very source; else None.

    Raises:
        BadSpec: it did, but under other verification than is requested now.
    """
    output = planned.journal.output
    if open_store(output).find(OUR_REPORT) is None or is_published(planned.journal):
        return None
    try:
        found = read_report(output)
    except (BadSpec, BadCheckpoint):
        # A report of another version, or a damaged one. `check_free` then says that the address is taken.
        return None
    wanted = job_document(planned.spec)
    is_made = found.run.key == planned.journal.key and {**found.job, "verify": wanted["verify"]} == wanted
    is_verified = is_made and _gate(found.job["verify"], wanted["verify"]) == wanted["verify"]
    if is_made and not is_verified:
        raise BadSpec(
            f"output.path: {output} is there, verified in another way; python -m jobs.verify"
            f" output.path={output} verify={planned.spec.verify.kind} ... judges it, output.overwrite=true redoes it"
        )
    return found if is_made else None


def _gate(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a passed gate that is comparable with the wanted one: verify=logits includes verify=strict."""
    if wanted["kind"] == "strict":
        return {**{key: found[key] for key in wanted if key in found}, "kind": "strict"}
    return found


# --- plan


def notes_of(planned: Planned) -> list[str]:
    """Return notes for the plan: the strategy, the backend, the memory and the disk space that the job needs."""
    strategy, why = planned.strategy
    cluster = LocalCluster(planned.spec.cluster)
    memory = max(unit.memory_bytes(cluster.threads) for unit in planned.plan.units) + strategy.held_bytes
    memory += staging_bytes({planned.backend[0]}, cluster.threads)
    output, records = planned.spec.output_address, planned.journal.count
    done = (
        [f"{records} of {len(planned.plan.units)} units are done already, by a job that was stopped"] if records else []
    )
    assembly, joining = planned.target.assembly, list[str]()
    if assembly is not None and assembly.joined is not None and not output.is_local:
        how = "the store copies them into it" if planned.journal.destination.assembles else "they are streamed into it"
        if output.scheme == "hf":
            where = planned.journal.destination.journal
            how = f"the Hub joins no parts: they are kept in {where}, and the whole is in scratch while it is uploaded"
        joining = [f"{assembly.joined.name} is made of {counted(len(planned.target.pieces), 'piece')}: {how}"]
    disk = (
        _of_disk("disk", planned.target.weight_bytes + planned.scratch_bytes, output.parent) if output.is_local else ""
    )
    scratch = scratch_bytes([planned])
    judging = [] if planned.judging is None else [planned.judging.note]
    return [
        *done,
        *judging,
        *joining,
        f"read by {strategy.name}: {why}",
        *([f"encoded on {planned.backend[0]}: {planned.backend[1]}"] if planned.spec.backend.kind == "auto" else []),
        f"memory: up to {tables.size(memory)} with {counted(cluster.threads, 'thread')}{disk}"
        + (_of_disk("scratch", scratch, Address.of(scratch_folder(planned.spec))) if scratch else ""),
    ]


def _of_disk(what: str, need: int, where: Address) -> str:
    free = free_bytes(where.path)
    at = f" in {where}" if what == "scratch" else ""
    return f"; {what}: needs {tables.size(need)}{at}, {tables.size(free)} free{', too little' if need > free else ''}"


def scratch_folder(spec: JobSpec) -> Path:
    """Return the folder of files on their way to or from a store that is not local."""
    return Path(spec.store.scratch or tempfile.gettempdir())


def scratch_bytes(jobs: Sequence[Planned]) -> int:
    """Return the most bytes that jobs over one source have in the scratch folder of a machine: outputs of the units in
    flight and another file on their way to a store, and what the memory budget cannot hold of a tensor that is read
    several times.
    """
    first = jobs[0]
    source, found = first.plan.checkpoint.source, 0
    remote = [job for job in jobs if not job.journal.destination.is_local]
    if remote:
        at_once = LocalCluster(first.spec.cluster).units_at_once
        outputs = Counter[str]()
        for unit in (unit for job in remote for unit in job.plan.units):
            outputs[unit.id] += sum(file.size for file in unit.outputs[TARGET].files)
        # A file of several units is joined there on its way to the Hub, when the units are done.
        joined = [sum(p.size for p in job.target.pieces) for job in remote if job.journal.output.scheme == "hf"]
        found += max(sum(size for _, size in outputs.most_common(at_once)), *joined, 0)
        # Other files are copied one by one. Those above the limit are streamed, but to the Hub, which takes files.
        largest = max((source.entry(name).size for job in remote for name in job.plan.aux_of(job.target)), default=0)
        found += largest if joined else min(int(first.spec.store.scratch_mb * MB), largest)
    return found if source.store.is_local else found + first.strategy[0].scratch_bytes(_uses(jobs))


def _uses(jobs: Sequence[Planned]) -> Iterator[Use]:
    """Yield what units read, when each is done for all jobs at once."""
    units: dict[str, Unit] = {}
    encodings: dict[str, list[Encoding]] = {}
    for unit in (unit for job in jobs for unit in job.plan.units):
        units.setdefault(unit.id, unit)
        for placement in unit.outputs[TARGET].placements:
            encodings.setdefault(placement.encoding.tensor.source_name, []).append(placement.encoding)
    for unit in units.values():
        yield from uses_of([tensor for tensor in unit.tensors if tensor.name in encodings], encodings).values()


def check_space(jobs: Sequence[tuple[Planned, int]]) -> None:
    """Check that outputs fit on their disks, which several may share. The bytes are what a job has written before.

    Raises:
        StorageError: outputs do not fit on a disk.
    """
    needs: dict[int, list[tuple[Planned, int]]] = {}
    if jobs:
        _check_scratch([planned for planned, _ in jobs])
    for planned, done_bytes in jobs:
        target, source = planned.target, planned.plan.checkpoint.source
        if not planned.journal.destination.is_local:
            continue
        aux = sum(source.entry(name).size for name in planned.plan.aux_of(target))
        need = target.weight_bytes + planned.scratch_bytes - done_bytes + aux + SPARE_BYTES
        disk = device_of(planned.journal.output.parent.path)
        needs.setdefault(disk, []).append((planned, need))
    for rows in needs.values():
        output, need = rows[0][0].spec.output_address, sum(need for _, need in rows)
        free = free_bytes(output.parent.path)
        if need > free:
            who = f"{output} needs" if len(rows) == 1 else f"{output} and {len(rows) - 1} more need"
            raise StorageError(
                f"output.path: {who} {tables.size(need)}, {tables.size(free)} are free there;"
                " make room, or choose another path"
            )


def _check_scratch(jobs: Sequence[Planned]) -> None:
    need, folder = scratch_bytes(jobs), scratch_folder(jobs[0].spec)
    free = free_bytes(folder)
    if need > free:
        raise StorageError(
            f"store.scratch: {folder} needs {tables.size(need)} for files on their way, {tables.size(free)} are free"
            " there; make room, choose another folder, or lower cluster.units_at_once or unit_mb"
        )
