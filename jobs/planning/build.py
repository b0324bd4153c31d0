"""Building a plan from a source and its targets: the units, and the place of every output byte. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from jobs.planning.cut import bonds_of, cut_units, shards
from jobs.planning.engine_rules import engine_rules, formed_sources
from jobs.planning.kept_dtype import kept_dtype
from jobs.planning.plan import Placement, Plan, TargetPlan, Unit, UnitOutput
from jobs.planning.targets import Target, TargetId, adapter_of, for_source, is_decoded, is_split, new_blocks_of
from jobs.planning.warnings import warnings
from jobs.spec.job import MB
from loaders.architectures import mlx, mlx_config
from loaders.checkpoints.adapter import open_adapter
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec
from loaders.imatrix.matrix import ImportanceMatrix
from loaders.imatrix.read import open_matrix
from loaders.layouts import Assembling, Layout, Placed
from loaders.layouts.diffusers import DiffusersLayout, component_of
from loaders.layouts.gguf.importances import weighed
from loaders.layouts.gguf.layout import GgufLayout
from loaders.layouts.hf import HfLayout
from loaders.layouts.mlx import MlxLayout
from loaders.rules.decide import decide
from loaders.rules.kept import cast_kept, declared_in
from loaders.rules.rule import Decision
from loaders.specs import OutputFile, Slot, StoredTensor
from loaders.storage.base import Entry
from loaders.tensors.block_expansion import expand_checkpoint, expand_sources
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.merge_lora import merge_adapter
from loaders.tensors.quantized_sources.mlx import check_towers, check_whole
from loaders.tensors.sources import Sources, tensors_of
from loaders.words import counted, size


def make_plan(checkpoint: Checkpoint, targets: Sequence[Target], unit_mb: float) -> Plan:
    """Plan one pass over a checkpoint for all targets; a unit has about `unit_mb` megabytes (1e6 bytes) of source.

    Raises:
        BadSpec: a target cannot be made of this checkpoint; all faults of one kind at once.
    """
    targets = [for_source(target, checkpoint) for target in targets]
    decode = is_decoded(checkpoint, targets)
    sources = tensors_of(checkpoint, decode=decode, split=is_split(checkpoint, targets))
    if decode and not all(isinstance(target.layout, MlxLayout) for target in targets):
        check_whole(checkpoint, sources.tensors)
    if decode and any(isinstance(target.layout, HfLayout) for target in targets):
        check_towers(checkpoint, sources.tensors)
    new_blocks = new_blocks_of(targets)
    if new_blocks:
        sources = expand_sources(checkpoint, sources, new_blocks)
        checkpoint = expand_checkpoint(checkpoint, new_blocks)
    adapter = adapter_of(targets)
    if adapter is not None:
        merged = merge_adapter(checkpoint, sources, open_adapter(adapter))
        checkpoint, sources = merged.checkpoint, merged.sources
    drafts = [_draft(checkpoint, sources, target, is_decoded=decode) for target in targets]
    is_gguf_kept = checkpoint.container == "gguf" and not decode
    bonds = {name: found for draft in drafts for name, found in bonds_of(draft.placed).items()}
    groups = cut_units(
        sources.tensors,
        unit_mb * MB,
        bonds,
        share=not is_gguf_kept,
        in_order=any(isinstance(draft.target.layout, Assembling) for draft in drafts),
        part_of=partial(component_of, checkpoint),
    )
    plans: dict[TargetId, TargetPlan] = {}
    outputs: list[dict[TargetId, UnitOutput]] = [{} for _ in groups]
    for target in targets:
        # Nothing else holds the draft then, which is a fifth of planning's memory.
        plans[target.id], made = _target_plan(drafts.pop(0), groups)
        for output, mine in zip(outputs, made, strict=True):
            output[target.id] = mine
    tags = {tag.name: tag for tag in checkpoint.files}
    units = tuple(
        Unit(f"unit-{index:05d}", _files_of(group, tags), tuple(group), output)
        for index, (group, output) in enumerate(zip(groups, outputs, strict=True), 1)
    )
    return Plan(checkpoint, sources, units, plans)


NOTHING: Mapping[str, bytes] = {}  # one object for the many tensors without constants


def _not_computed(layout: Layout, checkpoint: Checkpoint) -> list[str]:
    """Warn of what the source's config.json says and MLX's engine does not compute."""
    model = mlx.model_of(checkpoint.config) if isinstance(layout, MlxLayout) else None
    return [] if model is None else mlx_config.not_computed(model, checkpoint.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What is known of a target before units are cut: what is stored of each tensor, and under which name.

    `imatrix` is the importance matrix by which a GGUF is quantized, `notes` say what it lacks.
    """

    target: Target
    checkpoint: Checkpoint  # as its config is for the target
    decisions: tuple[Decision, ...]
    placed: tuple[Placed, ...]
    imatrix: ImportanceMatrix | None = None
    notes: tuple[str, ...] = ()


def _draft(checkpoint: Checkpoint, sources: Sources, target: Target, *, is_decoded: bool) -> Draft:
    dtype = kept_dtype(target, checkpoint, is_decoded=is_decoded)
    checkpoint = declared_in(checkpoint, dtype)
    sources = formed_sources(target, checkpoint, sources)
    decisions = decide(
        sources.tensors, target.scheme, target.rules, engine_rules(target, checkpoint, sources), kept_dtype=dtype
    )
    decisions = cast_kept(decisions, dtype)
    placed = target.layout.place(checkpoint, decisions)
    return _weighed(Draft(target=target, checkpoint=checkpoint, decisions=decisions, placed=placed))


def _weighed(draft: Draft) -> Draft:
    """Give each tensor of a GGUF the importances of its input channels, where the target has an importance matrix."""
    target = draft.target
    if not isinstance(target.layout, GgufLayout):  # no other takes ggml's types, which alone have a matrix
        return draft
    matrix = None if target.imatrix is None else open_matrix(target.imatrix)
    found = weighed(draft.placed, matrix, target.naming.label)
    schemes = {each.tensor.name: each.encoding.scheme for each in found.placed if each.encoding.importance is not None}
    decisions = tuple(
        replace(each, encoding=replace(each.encoding, scheme=schemes[each.tensor.name]))
        if each.encoding is not None and each.tensor.name in schemes
        else each
        for each in draft.decisions
    )
    if matrix is not None:
        target = replace(target, naming=replace(target.naming, metadata=matrix.metadata))
    return replace(draft, target=target, decisions=decisions, placed=found.placed, imatrix=matrix, notes=found.notes)


def _target_plan(draft: Draft, groups: Sequence[Sequence[LogicalTensor]]) -> tuple[TargetPlan, list[UnitOutput]]:
    """Plan a target's files, and what each unit writes of them."""
    target, checkpoint, decisions, layout = draft.target, draft.checkpoint, draft.decisions, draft.target.layout
    imatrix, weighing = draft.imatrix, draft.notes
    shares = _shares(draft.placed, groups)
    del draft
    per_unit, assembly = _files(target, checkpoint, shares), None
    counts, planned = [len(files) for files in per_unit], [file for files in per_unit for file in files]
    if isinstance(layout, Assembling):
        assembly = layout.assemble(checkpoint, decisions, planned, target.naming)
        planned = list(assembly.files)
    elif target.naming.split:
        raise BadSpec("output.split: only gguf can be one file or several; other outputs have a file for each unit")
    if target.container.index is None and layout.index(planned, 0, 0) is not None:
        raise BadSpec(
            f"output.container: layout {layout.name} lists its {len(planned)} files in an index, which container"
            f" {target.container.name} does not have; choose another, or a larger unit_mb, which makes fewer files"
        )
    # A layout that assembles files completes their headers, so its files go back to the units, in the same order.
    left = iter(planned)
    shares.reverse()  # what is stored of a unit goes when its places are known
    outputs = [_unit_output(shares.pop(), tuple(islice(left, count))) for count in counts]
    config = layout.config(checkpoint, decisions, target.compute_dtype)
    made: dict[str, bytes] = {}
    lost: list[str] = []
    if checkpoint.container == "gguf" and not isinstance(layout, GgufLayout):
        from loaders.layouts.gguf.made_files import made_files  # tokenizers of all kinds, for GGUFs alone

        made, lost = made_files(checkpoint)
    if isinstance(layout, DiffusersLayout):
        made = layout.configs(checkpoint, decisions, target.compute_dtype)
    notes = [
        *_larger_than_asked(target, planned),
        *weighing,
        *lost,
        *(assembly.notes if assembly is not None else ()),
        *_not_computed(layout, checkpoint),
    ]
    stored = {p.name: tuple(p.slots.values()) for output in outputs for p in output.placements}
    plan = TargetPlan(
        target=target,
        decisions=decisions,
        files=tuple(planned),
        stored=stored,
        config=config,
        warnings=(
            *layout.warnings(decisions),
            *warnings(checkpoint, target.scheme, decisions, config, layout, stored),
            *notes,
        ),
        assembly=assembly,
        made=made,
        imatrix=imatrix,
    )
    return plan, outputs


def _shares(placed: Sequence[Placed], groups: Sequence[Sequence[LogicalTensor]]) -> list[list[Placed]]:
    """Return what is stored of each unit's tensors."""
    by_source: dict[str, list[Placed]] = {}
    for each in placed:
        by_source.setdefault(each.tensor.source_name, []).append(each)
    return [[each for tensor in group for each in by_source.get(tensor.name, ())] for group in groups]


def _files(
    target: Target, checkpoint: Checkpoint, shares: Sequence[Sequence[Placed]]
) -> Sequence[tuple[OutputFile, ...]]:
    """Lay out, for each unit, a file of what it writes (if anything), and files that the layout wants apart.

    Of what is more than the target's `max_shard_bytes` there are several files.

    Raises:
        BadSpec: no unit writes anything, or the container cannot hold a tensor.
    """
    layout, container = target.layout, target.container
    stored = [[tensor for placed in share for tensor in placed.stored.values()] for share in shares]
    _check_shards(target)
    usual = [list(shards(share, target.max_shard_bytes)) for share in shares]
    firsts = [tensors[0].name for parts in usual for tensors in parts]
    if not any(stored):
        raise BadSpec("rules: every tensor is dropped; nothing would be left to write")
    if isinstance(layout, DiffusersLayout):
        names = iter(layout.file_names(checkpoint, firsts))
    else:
        names = (layout.file or container.file_name(n, len(firsts)) for n in range(1, len(firsts) + 1))
    files = []
    for share, tensors, parts in zip(shares, stored, usual, strict=True):
        about = layout.about(checkpoint, share)
        mine = [container.lay_out(next(names), part, about) for part in parts]
        for name in dict.fromkeys(tensor.place[0] for tensor in tensors if tensor.place is not None):
            apart = [tensor for tensor in tensors if tensor.place is not None and tensor.place[0] == name]
            mine.append(container.lay_out(name, apart, about))
        files.append(tuple(mine))
    return files


def _check_shards(target: Target) -> None:
    if target.max_shard_bytes is None:
        return
    if isinstance(target.layout, Assembling) or target.layout.file is not None:
        what = "output.split=true writes a GGUF as several files" if target.layout.name == "gguf" else "leave it out"
        raise BadSpec(f"output.max_shard_size: layout {target.layout.name} writes files of its own; {what}")


def _larger_than_asked(target: Target, files: Sequence[OutputFile]) -> list[str]:
    """Return a warning about files of one tensor, which is never cut, that are larger than `max_shard_bytes`."""
    most = target.max_shard_bytes
    larger = [] if most is None else [file for file in files if file.data_bytes > most]
    if most is None or not larger:
        return []
    largest = max(larger, key=lambda file: file.data_bytes)
    name = max(largest.slots, key=lambda slot: slot.size).name
    return [
        f"{counted(len(larger), 'file is', 'files are')} larger than output.max_shard_size, up to"
        f" {size(largest.data_bytes)} ({largest.name}): a tensor, with its scales, is in one file ({name})"
    ]


def _unit_output(share: Sequence[Placed], files: tuple[OutputFile, ...]) -> UnitOutput:
    places = {slot.name: slot for file in files for slot in file.slots}
    placements = tuple(
        Placement(
            placed.encoding,
            {role: _slot(places[tensor.name], tensor) for role, tensor in placed.stored.items()},
            {role: t.spec.constant for role, t in placed.stored.items() if t.spec.constant is not None} or NOTHING,
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
