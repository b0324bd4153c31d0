"""quant=auto: measuring candidates, choosing the mix, and turning the job into one that states each tensor's scheme.

The resulting job is a job like any other. The mix is part of its request, so that resuming it, verifying it and
computing its key need no measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from jobs.cli.progress import Meter
from jobs.cli.verb import note, show
from jobs.execution.choose import choose as choose_cluster
from jobs.execution.run_tasks import run_all
from jobs.mixed_precision.allocation import (
    Choices,
    Mixed,
    base_preset,
    budget_bytes,
    check_budget,
    choices_of,
    choose_mix,
    counted_bytes,
    errors_of,
    rules_of,
)
from jobs.mixed_precision.candidate_errors import Loss, Measurements, MeasuringTask, of_all, tensors_in
from jobs.output.destination import check_ours, check_output, check_place
from jobs.output.report import read_report
from jobs.report import tables
from jobs.spec.job import JobSpec
from jobs.spec.strategy import reading
from loaders.backends import check_backend
from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint, open_checkpoint
from loaders.errors import BadCheckpoint, BadSpec, io_errors
from loaders.missing import absent, not_installed
from loaders.presets.auto import AutoQuant
from loaders.quantization.importance import Importance
from loaders.storage.hashes import text_digest
from loaders.words import counted

FOLDER = ".measured"  # the folder of measurements in output.root, which later budgets use again
Importances = Mapping[str, tuple[Importance, ...]]


def mixed(spec: JobSpec, *, again: bool = False) -> JobSpec:
    """Return the job with a chosen mix, after measuring what was not measured before. Other jobs are returned as is.

    With `again`, the job's output may exist already.

    Raises:
        WeightmillError: measuring failed, or no mix is within the budget; finished measurements stay.
        KeyboardInterrupt: likewise.
    """
    if not isinstance(spec.quant, AutoQuant) or spec.quant.chosen is not None:
        return spec
    if again:
        check_place(spec, spec.output_address)
        check_ours(spec, spec.output_address)
        if (known := _chosen_before(spec, spec.quant)) is not None:
            return known
    else:
        check_output(spec)
    choices = _choices(spec, spec.quant)
    check_budget(choices)
    measurements = Measurements(_folder(spec), _weighting(spec.quant, choices.checkpoint))
    if _missing(choices, measurements):
        importances = _importances(spec.quant, choices.checkpoint, _folder(spec), measurements)
        _measure(choices, measurements, importances)
    found = choose_mix(choices, _losses(choices, measurements))
    show(text_of(choices, found))
    return found.spec


def _chosen_before(spec: JobSpec, quant: AutoQuant) -> JobSpec | None:
    """Return the job with the mix of the output that is there already, if it was asked for in the same words.

    Whether its source is still the same, planning finds out. The mix of a text follows from what is in it now.
    """
    if spec.output.overwrite or quant.calibration not in (None, "self"):
        return None
    try:
        before = read_report(spec.output_address).job["quant"]
        found = AutoQuant.model_validate(before, strict=False)
    except (BadSpec, BadCheckpoint, KeyError, ValueError):
        return None
    is_same = found.chosen is not None and found.model_copy(update={"chosen": None}) == quant
    return spec.model_copy(update={"quant": found}) if is_same else None


def known_mix(spec: JobSpec) -> tuple[JobSpec | None, RenderableType]:
    """Return, for a plan, the job with its mix and the text of the mix; or None and what would be measured first."""
    assert isinstance(spec.quant, AutoQuant)
    if (known := _chosen_before(spec, spec.quant)) is not None:
        return known, f"the mix is that of {spec.output_address}, which was asked for in the same words"
    choices = _choices(spec, spec.quant)
    check_budget(choices)
    measurements = Measurements(_folder(spec), _weighting(spec.quant, choices.checkpoint))
    if _missing(choices, measurements):
        return None, _to_be_measured(choices, measurements)
    found = choose_mix(choices, _losses(choices, measurements))
    return found.spec, Group(text_of(choices, found), "", _rules_text(found))


def _choices(spec: JobSpec, quant: AutoQuant) -> Choices:
    check_backend(spec.backend.asked)
    return choices_of(spec, quant, open_checkpoint(spec.model.address, spec.source.container))


def _folder(spec: JobSpec) -> Path:
    return spec.output.local_root / FOLDER


# --- what is measured already


@dataclass(frozen=True)
class Known:
    """The measured candidates that fit a budget, by error, and the best mix."""

    candidates: tuple[tuple[str, int, float], ...]  # name, bytes of weight files, weighted error
    mix: Mixed | None  # None if no mix fits


def known_within(spec: JobSpec) -> Known | None:
    """Return the errors of each candidate as a uniform scheme, and of their best mix; None if they are not measured.

    Raises:
        BadSpec: the candidates cannot be planned for this checkpoint.
    """
    assert isinstance(spec.quant, AutoQuant)
    choices = _choices(spec, spec.quant)
    measurements = Measurements(_folder(spec), _weighting(spec.quant, choices.checkpoint))
    if _missing(choices, measurements):
        return None
    losses = _losses(choices, measurements)
    errors, room = errors_of(choices, losses), budget_bytes(choices)
    sizes = {name: counted_bytes(spec.quant, target) for name, target in choices.plan.targets.items()}
    fitting = [(name, sizes[name], sum(errors[name].values())) for name in errors if sizes[name] <= room]
    try:
        mix = choose_mix(choices, losses)
    except BadSpec:
        mix = None
    return Known(tuple(sorted(fitting, key=lambda row: row[2])), mix)


# --- measuring


def _missing(choices: Choices, measurements: Measurements) -> list[tuple[int, tuple[str, ...]]]:
    """Return the units, by index, with the candidates that are not measured yet."""
    found = []
    for index, unit in enumerate(choices.plan.units):
        names = set(tensors_in(unit))
        wanted = {c: frozenset(names & taken) for c, taken in choices.open.items()}
        lacking = tuple(c for c, mine in wanted.items() if mine and measurements.find(unit, c, mine) is None)
        found += [(index, lacking)] if lacking else []
    return found


def _measure(choices: Choices, measurements: Measurements, importances: Importances) -> None:
    """Measure what is missing on the cluster; the measurements of a unit are kept as soon as it is finished."""
    strategy, _ = reading(choices.spec.strategy, choices.plan.checkpoint)
    cluster, _ = choose_cluster(choices.spec.cluster)
    backend = choices.spec.backend.asked
    tasks, units = [], {unit.id: unit for unit in choices.plan.units}
    missing = _missing(choices, measurements)
    for index, lacking in missing:
        unit = choices.plan.units[index]
        names = set(tensors_in(unit))
        wanted = {c: frozenset(names & choices.open[c]) for c in lacking}
        lean = replace(unit, outputs={c: unit.outputs[c] for c in lacking})
        mine = {name: importances[name] for name in names & set(importances)}
        tasks.append(
            MeasuringTask(
                unit=lean,
                source=choices.plan.checkpoint.address,
                wanted=wanted,
                strategy=strategy,
                backend=backend,
                threads=cluster.threads,
                importances=mine,
            )
        )
    taken = choices.tensors
    some = sum(not taken.keys().isdisjoint(tensors_in(unit)) for unit in units.values())
    if some > len(tasks):
        note(f"{some - len(tasks)} of {some} units were measured before; going on with the rest")
    with closing(run_all(cluster, tasks, "measuring", sum(task.work_bytes for task in tasks))) as reports:
        for report in reports:
            for candidate, losses in report.losses.items():
                measurements.add(units[report.unit], candidate, losses)


def _losses(choices: Choices, measurements: Measurements) -> dict[str, dict[str, Loss]]:
    """Return all measurements by candidate and tensor."""
    found: dict[str, dict[str, Loss]] = {}
    for candidate, taken in choices.open.items():
        of_units = []
        for unit in choices.plan.units:
            mine = taken & tensors_in(unit).keys()
            losses = measurements.find(unit, candidate, mine) if mine else {}
            assert losses is not None
            of_units.append(losses)
        found[candidate] = {name: loss for name, loss in of_all(of_units).items() if name in taken}
    return found


# --- the calibration


def _weighting(quant: AutoQuant, checkpoint: Checkpoint) -> str:
    """Return a digest of the calibration that errors are weighted by; empty without one."""
    if quant.calibration is None:
        return ""
    text = "" if quant.calibration == "self" else _text(quant.calibration)
    return text_digest(f"{checkpoint.files!r} {quant.calibration_tokens} {text_digest(text)}")


@lru_cache(maxsize=1)
def _text(path: str) -> str:
    with io_errors("reading", path):
        try:
            return Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadSpec(f"quant.calibration: {path} is no text in UTF-8 ({error.reason})") from None
        except FileNotFoundError:
            raise BadSpec(f"quant.calibration: {path}: not found; give a text file, or self") from None


def _importances(quant: AutoQuant, checkpoint: Checkpoint, folder: Path, measurements: Measurements) -> Importances:
    """Return the importances by the calibration, from the folder if they were computed before."""
    if quant.calibration is None:
        return {}
    from loaders.models import sensitivity

    path = folder / f"{_weighting(quant, checkpoint)}.npz"
    if path.is_file():
        return sensitivity.load(path)
    text = None if quant.calibration == "self" else _text(quant.calibration)
    if lacks := absent("torch", "transformers"):
        raise not_installed("quant.calibration", lacks)
    note("calibrating: the model reads " + ("what it writes" if text is None else str(quant.calibration)))
    # With calibration=self, the model writes the text before it reads it.
    passes = 2 if text is None else 1
    with Meter("calibrating", passes * quant.calibration_tokens, "tokens") as meter:
        found = sensitivity.importances_of(checkpoint.folder(READS_FOLDERS), text, quant.calibration_tokens, meter.add)
    sensitivity.save(found, path)
    return found


# --- texts


def text_of(choices: Choices, found: Mixed) -> RenderableType:
    """Render the mix as a table of tensors, bytes and the share of the error, by scheme and role."""
    quant = found.spec.quant
    assert isinstance(quant, AutoQuant)
    numbers = ("tensors", "weights", "bytes", "bits", "of the error")
    shown = tables.table("stored as", "role", *numbers, keys=2, right=numbers)
    for row in rows_of(choices, found):
        shown.add_row(
            row["candidate"], row["role"], str(row["tensors"]), f"{row['weights'] / 1e6:.2f} M",
            tables.size(row["bytes"]), f"{row['bits']:.2f}", f"{row['error_share']:.0%}",
        )  # fmt: skip
    target, choice = found.target, found.choice
    unit = "" if quant.calibration is None else " nats a token expected"
    budget = f"{quant.target_bits:g} bits per weight" if quant.target_bits else f"{quant.target_gb:g} GB"
    quality = "no mix loses less" if not choice.gap else f"at most {choice.gap:.2%} more than the least possible"
    bits = target.tensor_bytes * 8 / max(1, target.parameters)
    return Group(
        shown,
        f"{bits:.4f} bits per weight, {tables.size(target.weight_bytes)} of files, for a budget of {budget}",
        f"weighted error {choice.error:.4g}{unit}, by {quant.chosen.weighting if quant.chosen else ''}; {quality}",
    )


def rows_of(choices: Choices, found: Mixed) -> list[dict[str, Any]]:
    """Return the rows of the mix's table: for each candidate and role, tensors, weights, bytes, bits, error share."""
    quant = found.spec.quant
    assert isinstance(quant, AutoQuant)
    assert quant.chosen is not None
    tensors, whole = choices.tensors, found.choice.error or 1.0
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    sizes = {name: choices.sizes(name) for name in choices.open}
    for label, names in quant.chosen.tensors.items():
        for name in names:
            tensor = tensors[name]
            row = groups.setdefault((label, tensor.role), {"tensors": 0, "weights": 0, "bytes": 0, "error": 0.0})
            row["tensors"] += 1
            row["weights"] += tensor.spec.numel
            row["bytes"] += sizes[label][name] if label in sizes else choices.kept_bytes[name]
            row["error"] += found.errors[label][name] if label in sizes else 0.0
    return [
        {
            "candidate": label,
            "role": role,
            **row,
            "bits": row["bytes"] * 8 / row["weights"],
            "error_share": row["error"] / whole,
        }
        for (label, role), row in groups.items()
    ]


def _rules_text(found: Mixed) -> str:
    quant = found.spec.quant
    assert isinstance(quant, AutoQuant)
    lines = [f"the same as rules, for quant={base_preset(quant)}, with no measuring:"]
    for rule in rules_of(found.target.decisions):
        given = "".join(f", {key}: {_yaml(value)}" for key, value in rule.items() if key not in ("action", "name"))
        lines.append(f"- {{action: {rule['action']}, name: '{rule['name']}'{given}}}")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return str(value)


def _to_be_measured(choices: Choices, measurements: Measurements) -> str:
    missing = _missing(choices, measurements)
    names = {tensor.name for index, _ in missing for tensor in choices.plan.units[index].tensors}
    tensors = [tensor for tensor in choices.tensors.values() if tensor.name in names]
    candidates = sorted({c for _, mine in missing for c in mine}, key=list(choices.open).index)
    size = tables.size(sum(tensor.source_bytes for tensor in tensors))
    return (
        f"run will measure {len(tensors)} tensors, {size}, in {counted(len(missing), 'unit')}, each under"
        f" {', '.join(candidates)}; then it chooses, and writes in a second pass\n"
        "what was measured stays: another budget measures nothing again, and plan then shows its mix"
    )
