"""What planned jobs need of this machine: notes on it for the plan, and a check that disks have room."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.execution.choose import is_local
from jobs.execution.cluster import LocalCluster
from jobs.execution.unit import staging_bytes
from jobs.orchestration.preflight import Planned
from jobs.planning.plan import Unit
from jobs.planning.targets import TARGET
from jobs.spec.job import JobSpec
from jobs.tracking.run import untracked
from loaders.errors import StorageError
from loaders.storage.address import Address
from loaders.storage.local import device_of, free_bytes
from loaders.storage.settings import MB
from loaders.strategies.base import Use
from loaders.tensors.encoding import Encoding
from loaders.tensors.uses import uses_of
from loaders.words import counted, size

SPARE_BYTES = 16 << 20  # free bytes that an output needs besides its planned files: config, index, records


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
    need = planned.target.weight_bytes + planned.doubled_bytes
    disk = [_of_disk("disk", need, output.parent)] if output.is_local else []
    scratch = scratch_bytes([planned])
    judging = [] if planned.judging is None else [planned.judging.note]
    return [
        *done,
        *judging,
        *untracked(planned.spec.tracking),
        *_joining(planned),
        f"read by {strategy.name}: {why}",
        *([f"encoded on {planned.backend[0]}: {planned.backend[1]}"] if planned.spec.backend.kind == "auto" else []),
        f"memory: up to {size(memory)} with {counted(cluster.threads, 'thread')}, beside Python and its libraries",
        *disk,
        *([_of_disk("scratch", scratch, Address.of(scratch_folder(planned.spec)))] if scratch else []),
    ]


def _joining(planned: Planned) -> list[str]:
    """Return how an output's file is joined of pieces in a store that is not local."""
    assembly, destination = planned.target.assembly, planned.journal.destination
    if assembly is None or assembly.joined is None or destination.is_local:
        return []
    how = "the store copies them into it" if destination.assembles else "they are streamed into it"
    if planned.journal.output.scheme == "hf":
        how = (
            f"the Hub joins no parts: they are kept in {destination.journal}, and the whole is in scratch while it is"
            " uploaded"
        )
    return [f"{assembly.joined.name} is made of {counted(len(planned.target.pieces), 'piece')}: {how}"]


def _of_disk(what: str, need: int, where: Address) -> str:
    free = free_bytes(where.path)
    at = f" in {where}" if what == "scratch" else ""
    return f"{what}: needs {size(need)}{at}, {size(free)} free{', too little' if need > free else ''}"


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
        need = target.weight_bytes + planned.doubled_bytes - done_bytes + aux + SPARE_BYTES
        disk = device_of(planned.journal.output.parent.path)
        needs.setdefault(disk, []).append((planned, need))
    for rows in needs.values():
        output, need = rows[0][0].spec.output_address, sum(need for _, need in rows)
        free = free_bytes(output.parent.path)
        if need > free:
            who = f"{output} needs" if len(rows) == 1 else f"{output} and {len(rows) - 1} more need"
            raise StorageError(
                f"output.path: {who} {size(need)}, {size(free)} are free there; make room, or choose another path"
            )


def _check_scratch(jobs: Sequence[Planned]) -> None:
    need = scratch_bytes(jobs)
    # Without a temporary folder that can be written, jobs that need none run all the same.
    if need == 0:
        return
    folder = scratch_folder(jobs[0].spec)
    free = free_bytes(folder)
    if need > free:
        raise StorageError(
            f"store.scratch: {folder} needs {size(need)} for files on their way, {size(free)} are free"
            " there; make room, choose another folder, or lower cluster.units_at_once or unit_mb"
        )


# --- the scratch folder


def scratch_folder(spec: JobSpec) -> Path:
    """Return the folder of files on their way to or from a store that is not local."""
    return Path(spec.store.scratch or tempfile.gettempdir())


def scratch_bytes(jobs: Sequence[Planned]) -> int:
    """Return the most bytes that jobs over one source have in the scratch folder of this machine: outputs of the units
    in flight and another file on their way to a store, and what the memory budget cannot hold of a tensor that is read
    several times. If units run elsewhere, their machines are asked for the room, and the other file alone is left.
    """
    first = jobs[0]
    source, found, is_here = first.plan.checkpoint.source, 0, is_local(first.spec.cluster)
    remote = [job for job in jobs if not job.journal.destination.is_local]
    if remote:
        at_once = LocalCluster(first.spec.cluster).units_at_once
        outputs = Counter[str]()
        for unit in (unit for job in remote for unit in job.plan.units):
            outputs[unit.id] += sum(file.size for file in unit.outputs[TARGET].files)
        # A file of several units is joined there on its way to the Hub, when the units are done.
        joined = [sum(p.size for p in job.target.pieces) for job in remote if job.journal.output.scheme == "hf"]
        found += max(sum(count for _, count in outputs.most_common(at_once)), *joined, 0) if is_here else 0
        # Other files are copied one by one. Those above the limit are streamed, but to the Hub, which takes files.
        largest = max((source.entry(name).size for job in remote for name in job.plan.aux_of(job.target)), default=0)
        found += largest if joined else min(int(first.spec.store.scratch_mb * MB), largest)
    return found if source.store.is_local or not is_here else found + first.strategy[0].scratch_bytes(_uses(jobs))


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
