"""Before a job runs: what it would do, exactly, and everything cheap that can be wrong with it. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs import report
from jobs.clusters import is_local
from jobs.execution import LocalCluster
from jobs.journal import Journal, find_journals
from jobs.judging import Judging, judging_of
from jobs.planning import Plan, TargetPlan, make_plan
from jobs.publish import check_replaceable, is_published
from jobs.spec import JobSpec, LogitsSpec
from jobs.strategies import reading
from jobs.targets import Target
from loaders.backends import best, kernels_of
from loaders.checkpoint import OUR_REPORT, Checkpoint, open_checkpoint, read_json
from loaders.errors import BadSpec, StorageError, WeightmillError
from loaders.integrity import text_digest
from loaders.layouts import Naming
from loaders.quants import Bnb4Quant
from loaders.storage.local import free_bytes
from loaders.strategies import WeightLoader

TARGET = "target"  # a single job's
SPARE_BYTES = 16 << 20  # for config, index, records


@dataclass(frozen=True)
class Planned:
    """A job and its plan."""

    spec: JobSpec
    plan: Plan
    journal: Journal
    done: Mapping[str, Any] | None = None  # the report of an earlier run of this very job, where that may count
    judging: Judging | None = None  # with verify=logits

    @property
    def target(self) -> TargetPlan:
        return self.plan.targets[TARGET]

    @property
    def scratch_bytes(self) -> int:
        """What the disk holds twice: of pieces that other processes make apart, one at a time."""
        return 0 if is_local(self.spec.cluster) else max((piece.size for piece in self.target.pieces), default=0)

    @cached_property
    def strategy(self) -> tuple[WeightLoader, str]:
        """The strategy to read with, and why."""
        return reading(self.spec.strategy, self.plan.checkpoint)

    @cached_property
    def backend(self) -> tuple[str, str]:
        """Where encoders run, and why."""
        return backend_of(self.spec)


def plan_job(
    spec: JobSpec, opened: Callable[[str, str], Checkpoint] = open_checkpoint, *, again: bool = False
) -> Planned:
    """Everything cheap: headers, rules, sizes, the output's place. Nothing is written.

    With `again`, an output that this very job has made before is no fault: see `Planned.done`.

    Raises:
        BadSpec: it cannot be done; every fault of one kind at once.
        BadCheckpoint: the source is damaged.
    """
    output = spec.output_path
    _check_place(spec, output)
    if not again:
        _check_free(spec, output)
    if spec.model.path is None:
        raise BadSpec(
            f"model.path: missing; fetch {spec.model.hub_id} into a folder (hf download {spec.model.hub_id}"
            " --local-dir DIR) and give model.path=DIR: reading from the Hub is not built yet"
        )
    target = target_of(spec)
    kernels_of(backend_of(spec)[0])
    checkpoint = opened(spec.model.path, spec.source.container)
    plan = make_plan(checkpoint, [target], spec.source.unit_mb)
    made = plan.targets[TARGET]
    key = text_digest(" ".join(unit.key(TARGET) for unit in plan.units) + str((made.config, made.assembly, made.made)))
    planned = Planned(spec, plan, Journal(output, key))
    assert planned.strategy  # which may be refused
    if again and (done := _done_before(planned)) is not None:
        return replace(planned, done=done)
    if again:
        _check_free(spec, output)
    if isinstance(spec.verify, LogitsSpec):
        return replace(planned, judging=judging_of(spec.verify, plan, made, output.parent))
    return planned


def _done_before(planned: Planned) -> Mapping[str, Any] | None:
    """The report of the output, if this very job made it, from this very source.

    Raises:
        BadSpec: it did, and did not verify it as is asked now.
    """
    output = planned.journal.output
    if not (output / OUR_REPORT).is_file() or is_published(planned.journal):
        return None
    is_made, is_verified = False, False
    with suppress(WeightmillError, KeyError, TypeError):
        found = read_json(output / OUR_REPORT)
        wanted = {k: v for k, v in planned.spec.resolved().items() if k in found["job"]}
        gate = _gate(found["job"]["verify"], wanted["verify"])
        is_made = found["run"]["key"] == planned.journal.key and {**found["job"], "verify": wanted["verify"]} == wanted
        is_verified = gate == wanted["verify"]
    if is_made and not is_verified:
        raise BadSpec(
            f"output.path: {output} is there, verified in another way; python -m jobs.verify"
            f" output.path={output} verify={planned.spec.verify.kind} ... judges it, output.overwrite=true redoes it"
        )
    return found if is_made else None


def _gate(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """The gate that an output passed, as far as it is asked for: who passed logits is strict enough."""
    if wanted["kind"] == "strict":
        return {**{key: found[key] for key in wanted if key in found}, "kind": "strict"}
    return found


def backend_of(spec: JobSpec) -> tuple[str, str]:
    """The backend of a job, and why: of `auto`, this machine's fastest that the scheme runs on."""
    kind = spec.backend.kind
    if kind != "auto":
        return kind, "as asked"
    found, known = best(), spec.quant.scheme.backends
    if found == "cpu":
        return found, "this machine has no GPU that torch or mlx finds"
    if found in known:
        return found, "this machine has one"
    return "cpu", f"quant={spec.quant.name} runs on {', '.join(known)}, not on this machine's {found}"


def target_of(spec: JobSpec) -> Target:
    """The result that a job wants.

    Raises:
        BadSpec: its scheme does not run on the backend.
    """
    scheme, backend = spec.quant.scheme, backend_of(spec)[0]
    if backend not in scheme.backends:
        raise BadSpec(f"backend: quant={spec.quant.name} runs on {', '.join(scheme.backends)}, not on {backend}")
    compute_dtype = spec.quant.compute_dtype if isinstance(spec.quant, Bnb4Quant) else None
    naming = Naming(spec.model_name, spec.quant.label, spec.output.split)
    return Target(
        TARGET, scheme, spec.own_rules, compute_dtype, spec.quant.mix, spec.output.layout, spec.output.container,
        naming, spec.transform.num_blocks or 0,
    )  # fmt: skip


def check_output(spec: JobSpec) -> None:
    """Raises BadSpec: nothing may be written where the output is to be."""
    _check_place(spec, spec.output_path)
    _check_free(spec, spec.output_path)


def _check_place(spec: JobSpec, output: Path) -> None:
    source = Path(spec.model.path).resolve() if spec.model.path is not None else None
    real = output.resolve()
    if source is not None and (real == source or real.is_relative_to(source) or source.is_relative_to(real)):
        raise BadSpec(f"output.path: {output} and the source {source} lie in one another; choose another path")
    around = next((parent for parent in output.parents if (parent / OUR_REPORT).is_file()), None)
    if around is not None:
        raise BadSpec(f"output.path: {output} lies within another output, {around}; choose another path")


def _check_free(spec: JobSpec, output: Path) -> None:
    if output.exists() and spec.output.overwrite:
        check_replaceable(output)
    elif (output.exists() or output.is_symlink()) and not _left_over(output):
        raise BadSpec(f"output.path: {output} exists; output.overwrite=true replaces it, or choose another path")


def _left_over(output: Path) -> bool:
    """Whether an interrupted job has published this output and only not cleaned up behind itself."""
    return (output / OUR_REPORT).is_file() and bool(find_journals(output.parent, output.name))


# --- plan


def plan_document(planned: Planned, notes: Sequence[str]) -> dict[str, Any]:
    """The plan for machines."""
    plan, target = planned.plan, planned.target
    return {
        "status": "planned",
        "source": {**report.source_document(plan), "parameters": plan.parameters, "bytes": plan.source_bytes},
        "output": {
            "path": str(planned.spec.output_path),
            "quant": planned.spec.quant.name,
            "tensor_bytes": target.tensor_bytes,
            "file_bytes": target.weight_bytes,
            "slack_bytes": target.slack_bytes,
            "ratio": plan.source_bytes / target.tensor_bytes,
            "bits_per_weight": target.tensor_bytes * 8 / max(1, plan.parameters),
            "files": [{"name": file.name, "bytes": file.size, "tensors": len(file.slots)} for file in target.finals],
        },
        "rules": report.decision_rows(target),
        "tensors": [
            {
                "name": d.recipe.name,
                "role": d.recipe.role,
                "action": d.action,
                "why": d.rule.why,
                "dtype": d.recipe.dtype.name,
                "shape": list(d.recipe.shape),
                "source_bytes": d.recipe.source_bytes,
                "stored": [
                    {"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape), "bytes": s.size}
                    for s in target.stored.get(d.recipe.name, ())
                ],
            }
            for d in target.decisions
        ],
        "units": [
            {"id": unit.id, "source_bytes": unit.source_bytes, "tensors": len(unit.recipes)} for unit in plan.units
        ],
        "tied": [{"kept": kept, "tied": tied} for kept, tied in plan.sources.tied],
        "warnings": [*plan.checkpoint.notes, *plan.sources.notes, *target.warnings],
        "notes": list(notes),
    }


def notes_of(planned: Planned) -> list[str]:
    """What will be used, and what it will need."""
    strategy, why = planned.strategy
    cluster = LocalCluster(planned.spec.cluster)
    memory = max(unit.memory_bytes(cluster.threads) for unit in planned.plan.units) + strategy.held_bytes
    free = free_bytes(planned.spec.output_path.parent)
    records = len(list(planned.journal.records.glob("*.json"))) if planned.journal.records.is_dir() else 0
    done = (
        [f"{records} of {len(planned.plan.units)} units are done already, by a job that was stopped"] if records else []
    )
    need = planned.target.weight_bytes + planned.scratch_bytes
    room = " TOO LITTLE" if need > free else ""
    judging = [] if planned.judging is None else [planned.judging.note]
    return [
        *done,
        *judging,
        f"read by {strategy.name}: {why}",
        *([f"encoded on {planned.backend[0]}: {planned.backend[1]}"] if planned.spec.backend.kind == "auto" else []),
        f"memory: up to {report.size(memory)} a unit of {cluster.threads} threads;"
        f" disk: {report.size(need)} of {report.size(free)} free{room}",
    ]


def check_space(jobs: Sequence[tuple[Planned, int]]) -> None:
    """Raises StorageError when outputs cannot fit; the bytes are those that a job has written before."""
    needs: dict[int, list[tuple[Planned, int]]] = {}
    for planned, done_bytes in jobs:
        target = planned.target
        aux = sum((planned.plan.checkpoint.root / name).stat().st_size for name in planned.plan.aux_of(target))
        need = target.weight_bytes + planned.scratch_bytes - done_bytes + aux + SPARE_BYTES
        needs.setdefault(planned.journal.root.stat().st_dev, []).append((planned, need))
    for rows in needs.values():
        output, need = rows[0][0].spec.output_path, sum(need for _, need in rows)
        free = free_bytes(output.parent)
        if need > free:
            who = f"{output} needs" if len(rows) == 1 else f"{output} and {len(rows) - 1} more need"
            raise StorageError(
                f"output.path: {who} {report.size(need)}, {report.size(free)} are free there;"
                " make room, or choose another path"
            )
