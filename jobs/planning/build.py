"""Building a plan from a source and its targets: the units, and the place of every output byte. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, islice

from jobs.planning.plan import Placement, Plan, TargetPlan, Unit, UnitOutput
from jobs.planning.targets import Target, TargetId, is_decoded, is_split, new_blocks_of
from jobs.planning.warnings import warnings
from jobs.spec.job import MB
from loaders.architectures import mlx, mlx_config
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec
from loaders.layouts import Assembling, Layout, Placed
from loaders.layouts.gguf.layout import GgufLayout
from loaders.layouts.gguf.made_files import made_files
from loaders.layouts.mlx import MlxLayout
from loaders.rules.decide import decide
from loaders.specs import OutputFile, Slot, StoredTensor
from loaders.storage.base import Entry
from loaders.tensors.block_expansion import expand_checkpoint, expand_sources
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.sources import tensors_of


def make_plan(checkpoint: Checkpoint, targets: Sequence[Target], unit_mb: float) -> Plan:
    """Plan one pass over a checkpoint for all targets; a unit has about `unit_mb` megabytes (1e6 bytes) of source.

    Raises:
        BadSpec: a target cannot be made of this checkpoint; all faults of one kind at once.
    """
    sources = tensors_of(checkpoint, decode=is_decoded(checkpoint, targets), split=is_split(checkpoint, targets))
    new_blocks = new_blocks_of(targets)
    if new_blocks:
        sources = expand_sources(checkpoint, sources, new_blocks)
        checkpoint = expand_checkpoint(checkpoint, new_blocks)
    groups = cut_units(sources.tensors, unit_mb * MB)
    plans: dict[TargetId, TargetPlan] = {}
    outputs: list[dict[TargetId, UnitOutput]] = [{} for _ in groups]
    for target in targets:
        engine_rules = None if target.mix is None else target.mix.rules(sources.tensors, checkpoint.config)
        decisions = decide(sources.tensors, target.scheme, target.rules, engine_rules)
        layout = target.layout
        placed = {p.tensor.name: p for p in layout.place(checkpoint, decisions)}
        shares = [[placed[r.name] for r in group if r.name in placed] for group in groups]
        per_unit, assembly = _files(target, checkpoint, shares), None
        counts, planned = [len(files) for files in per_unit], [file for files in per_unit for file in files]
        if isinstance(layout, Assembling):
            assembly = layout.assemble(checkpoint, decisions, planned, target.naming)
            planned = list(assembly.files)
        elif target.naming.split:
            raise BadSpec("output.split: only gguf can be one file or several; other outputs have a file for each unit")
        # A layout that assembles files completes their headers, so its files go back to the units, in the same order.
        left = iter(planned)
        for index, (share, count) in enumerate(zip(shares, counts, strict=True)):
            outputs[index][target.id] = _unit_output(share, tuple(islice(left, count)))
        config = layout.config(checkpoint, decisions, target.compute_dtype)
        made, lost = ({}, []) if isinstance(layout, GgufLayout) else made_files(checkpoint)
        notes = [*lost, *(assembly.notes if assembly is not None else ()), *_not_computed(layout, checkpoint)]
        plans[target.id] = TargetPlan(
            target=target,
            decisions=decisions,
            files=tuple(planned),
            stored={p.name: tuple(p.slots.values()) for o in outputs for p in o[target.id].placements},
            config=config,
            warnings=(
                *layout.warnings(decisions),
                *warnings(checkpoint, target.scheme, decisions, config, layout),
                *notes,
            ),
            assembly=assembly,
            made=made,
        )
    tags = {tag.name: tag for tag in checkpoint.files}
    units = tuple(
        Unit(f"unit-{index:05d}", _files_of(group, tags), tuple(group), output)
        for index, (group, output) in enumerate(zip(groups, outputs, strict=True), 1)
    )
    return Plan(checkpoint, sources, units, plans)


def _not_computed(layout: Layout, checkpoint: Checkpoint) -> list[str]:
    """Warn of what the source's config.json says and MLX's engine does not compute."""
    model = mlx.model_of(checkpoint.config) if isinstance(layout, MlxLayout) else None
    return [] if model is None else mlx_config.not_computed(model, checkpoint.config)


def cut_units(tensors: Sequence[LogicalTensor], unit_bytes: float) -> list[list[LogicalTensor]]:
    """Cut tensors into runs of whole decoder blocks, each of at most `unit_bytes` of source or a single block.

    Blocks stay whole because tensors of a fused group, which may share a scale, are in one block. Tensors come sorted
    by block, or in the order of a GGUF, whose tensors share nothing.
    """
    units: list[list[LogicalTensor]] = []
    size = 0
    for _, run in groupby(tensors, key=lambda tensor: tensor.block):
        block = list(run)
        block_bytes = sum(tensor.source_bytes for tensor in block)
        if not units or size + block_bytes > unit_bytes:
            units.append([])
            size = 0
        units[-1].extend(block)
        size += block_bytes
    return units


def _files(
    target: Target, checkpoint: Checkpoint, shares: Sequence[Sequence[Placed]]
) -> Sequence[tuple[OutputFile, ...]]:
    """Lay out, for each unit, one file of what it writes (if anything), and files that the layout wants apart.

    Raises:
        BadSpec: no unit writes anything, or the container cannot hold a tensor.
    """
    layout, container = target.layout, target.container
    stored = [[tensor for placed in share for tensor in placed.stored.values()] for share in shares]
    count = sum(any(tensor.place is None for tensor in tensors) for tensors in stored)
    if not any(stored):
        raise BadSpec("rules: every tensor is dropped; nothing would be left to write")
    number, files = 0, []
    for share, tensors in zip(shares, stored, strict=True):
        about, mine = layout.about(checkpoint, share), []
        usual = [tensor for tensor in tensors if tensor.place is None]
        if usual:
            number += 1
            mine.append(container.lay_out(layout.file or container.file_name(number, count), usual, about))
        for name in dict.fromkeys(tensor.place[0] for tensor in tensors if tensor.place is not None):
            apart = [tensor for tensor in tensors if tensor.place is not None and tensor.place[0] == name]
            mine.append(container.lay_out(name, apart, about))
        files.append(tuple(mine))
    return files


def _unit_output(share: Sequence[Placed], files: tuple[OutputFile, ...]) -> UnitOutput:
    places = {slot.name: slot for file in files for slot in file.slots}
    placements = tuple(
        Placement(
            placed.encoding,
            {role: _slot(places[tensor.name], tensor) for role, tensor in placed.stored.items()},
            {role: t.spec.constant for role, t in placed.stored.items() if t.spec.constant is not None},
        )
        for placed in share
    )
    return UnitOutput(files, placements)


def _slot(place: Slot, tensor: StoredTensor) -> Slot:
    """Return the slot of a stored tensor: that of its name, or a part of it if the tensor is part of a stack."""
    if tensor.whole is None:
        return place
    name, at = f"{place.name}@{tensor.offset}", place.offset + tensor.offset
    return Slot(
        name=name, dtype=tensor.spec.dtype, shape=tensor.spec.shape, offset=at, within=(place.name, tensor.offset)
    )


def _files_of(tensors: Iterable[LogicalTensor], tags: Mapping[str, Entry]) -> tuple[Entry, ...]:
    return tuple(sorted({tags[spec.file] for tensor in tensors for _, spec in tensor.stored}))
