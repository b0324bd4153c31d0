"""Plans: from a checkpoint's headers and the wanted targets to units of work and the place of every output byte.

Pure data from pure functions. Units are cut from the source and its family alone, so any set of targets over one
checkpoint has the same units, and a sweep and a single job can resume each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any

from jobs.spec import MB
from jobs.targets import Target, TargetId, is_decoded, is_split, new_blocks_of
from jobs.warning import warnings
from loaders.checkpoint import Checkpoint
from loaders.decoding import METHOD_FILES
from loaders.errors import BadSpec
from loaders.expansion import expand_checkpoint, expand_sources
from loaders.integrity import text_digest
from loaders.layouts import (
    Assembling,
    Assembly,
    Placed,
)
from loaders.layouts.gguf import GgufLayout
from loaders.layouts.gguf_tokenizer_files import tokenizer_files
from loaders.quantization.scheme import Scheme
from loaders.recipes import Recipe
from loaders.rules import Decision, decide
from loaders.sources import Sources, recipes_of
from loaders.specs import DType, OutputFile, RowOrder, Slot, StoredTensor, TensorSpec
from loaders.storage.local import FileTag
from loaders.work import THREAD_BYTES

FORMAT = 1  # of plans and records: another version's are refused


@dataclass(frozen=True, slots=True)
class Placement:
    """What becomes of one recipe, and the bytes that its results fill."""

    recipe: str
    action: str
    scheme: Scheme
    cast: DType | None
    slots: Mapping[str, Slot]
    constants: Mapping[str, bytes]
    order: RowOrder | None = None

    def encoded_spec(self, recipe: Recipe) -> TensorSpec:
        """What the scheme sees: the recipe's weights after the cast."""
        return recipe.spec if self.cast is None else replace(recipe.spec, dtype=self.cast)


@dataclass(frozen=True, slots=True)
class UnitOutput:
    """A unit's share of a target: its files or pieces of files, none if all its tensors are dropped."""

    files: tuple[OutputFile, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of whole blocks, read once for all targets."""

    id: str
    sources: tuple[FileTag, ...]
    recipes: tuple[Recipe, ...]
    outputs: Mapping[TargetId, UnitOutput]

    @property
    def source_bytes(self) -> int:
        return sum(recipe.source_bytes for recipe in self.recipes)

    def key(self, target: TargetId) -> str:
        """Names the work that this unit is for a target: a record with another key is of other work."""
        output = self.outputs[target]
        return text_digest(f"{FORMAT} {self.sources!r} {self.recipes!r} {output!r}")

    def memory_bytes(self, threads: int) -> int:
        """What running it holds at most, beyond the libraries."""
        recipes = {recipe.name: recipe for recipe in self.recipes}
        state = max(
            (
                p.scheme.state_bytes(p.encoded_spec(recipes[p.recipe]))
                for output in self.outputs.values()
                for p in output.placements
            ),
            default=0,
        )
        return threads * THREAD_BYTES + state


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """A target, decided: what becomes of each tensor, and every file of its output but the aux files."""

    target: Target
    decisions: tuple[Decision, ...]
    files: tuple[OutputFile, ...]
    stored: Mapping[str, tuple[Slot, ...]]  # by tensor
    config: Mapping[str, Any] | None
    warnings: tuple[str, ...]
    assembly: Assembly | None = None
    made: Mapping[str, bytes] = field(default_factory=dict)  # aux files that come from the source's metadata

    @property
    def finals(self) -> tuple[OutputFile, ...]:
        """The output's weight files: those of the units, and the one that pieces are ranges of."""
        pieces = self.pieces
        if not pieces:
            return self.files
        joined = None if self.assembly is None else self.assembly.joined
        assert joined is not None
        at, slots = 0, list[Slot]()
        for piece in pieces:
            slots += [replace(slot, offset=at + slot.offset) for slot in piece.slots]
            at += piece.size
        tail = 0 if joined.tail is None else joined.tail.size
        whole = OutputFile(
            joined.name, len(joined.head), at, tuple(slots), pieces[0].container, tail, about=joined.head or None
        )
        return (whole, *(file for file in self.files if file.within is None))

    @property
    def pieces(self) -> tuple[OutputFile, ...]:
        """Ranges of a file that several units write, in order."""
        return tuple(file for file in self.files if file.within is not None)

    @property
    def shared(self) -> OutputFile | None:
        """The file that the pieces are ranges of."""
        return self.finals[0] if self.pieces else None

    @property
    def parameters(self) -> int:
        """Numbers in all tensors that are written, before they were quantized."""
        return sum(d.recipe.spec.numel for d in self.decisions if d.action != "drop")

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all stored tensors, or at most so many where a length depends on values."""
        return sum(file.tensor_bytes for file in self.files)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(file.size for file in self.finals)

    @property
    def slack_bytes(self) -> int:
        """By how much the files may be smaller than planned: tensors whose length depends on values."""
        return sum(SLACK for file in self.files for slot in file.slots if slot.is_bound)


SLACK = 64  # a number of a few to as many characters, and what aligns the tensor after it


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole pass over one checkpoint."""

    checkpoint: Checkpoint
    sources: Sources
    units: tuple[Unit, ...]
    targets: Mapping[TargetId, TargetPlan]

    @property
    def source_bytes(self) -> int:
        return sum(unit.source_bytes for unit in self.units)

    @property
    def aux(self) -> tuple[str, ...]:
        """The other files that may go along: once weights are decoded, none that tells how they were quantized."""
        is_decoded = any(recipe.decode is not None for recipe in self.sources.recipes)
        return tuple(name for name in self.checkpoint.aux if not (is_decoded and name in METHOD_FILES))

    def aux_of(self, target: TargetPlan) -> tuple[str, ...]:
        """Those of them that the target's layout wants."""
        layout = target.target.layout
        wanted = layout.aux(self.checkpoint) if isinstance(layout, Assembling) else self.aux
        return tuple(name for name in wanted if name in self.aux)

    @property
    def parameters(self) -> int:
        """Numbers in all float weights."""
        return sum(r.spec.numel for r in self.sources.recipes if r.dtype.is_float)


def make_plan(checkpoint: Checkpoint, targets: Sequence[Target], unit_mb: float) -> Plan:
    """Plan a pass.

    Raises:
        BadSpec: what is asked for cannot be done with this checkpoint; every fault at once.
    """
    sources = recipes_of(checkpoint, decode=is_decoded(checkpoint, targets), split=is_split(checkpoint, targets))
    new_blocks = new_blocks_of(targets)
    if new_blocks:
        sources = expand_sources(checkpoint, sources, new_blocks)
        checkpoint = expand_checkpoint(checkpoint, new_blocks)
    groups = cut_units(sources.recipes, unit_mb * MB)
    plans: dict[TargetId, TargetPlan] = {}
    outputs: list[dict[TargetId, UnitOutput]] = [{} for _ in groups]
    for target in targets:
        engine_rules = None if target.mix is None else target.mix.rules(sources.recipes, checkpoint.config)
        decisions = decide(sources.recipes, target.scheme, target.rules, engine_rules)
        layout = target.layout
        placed = {p.recipe.name: p for p in layout.place(checkpoint, decisions)}
        shares = [[placed[r.name] for r in group if r.name in placed] for group in groups]
        per_unit, assembly = _files(target, checkpoint, shares), None
        counts, planned = [len(files) for files in per_unit], [file for files in per_unit for file in files]
        if isinstance(layout, Assembling):
            assembly = layout.assemble(checkpoint, decisions, planned, target.naming)
            planned = list(assembly.files)
        elif target.naming.split:
            raise BadSpec("output.split: only gguf can be one file or several; other outputs have a file for each unit")
        left = iter(planned)
        for index, (share, count) in enumerate(zip(shares, counts, strict=True)):
            outputs[index][target.id] = _unit_output(share, tuple(islice(left, count)))
        config = layout.config(checkpoint, decisions, target.compute_dtype)
        plans[target.id] = TargetPlan(
            target,
            decisions,
            tuple(planned),
            {p.recipe: tuple(p.slots.values()) for o in outputs for p in o[target.id].placements},
            config,
            (*layout.warnings(decisions), *warnings(checkpoint, target.scheme, decisions, config, layout)),
            assembly,
            {} if isinstance(layout, GgufLayout) else tokenizer_files(checkpoint),
        )
    tags = {tag.name: tag for tag in checkpoint.files}
    units = tuple(
        Unit(f"unit-{index:05d}", _files_of(group, tags), tuple(group), output)
        for index, (group, output) in enumerate(zip(groups, outputs, strict=True), 1)
    )
    return Plan(checkpoint, sources, units, plans)


def cut_units(recipes: Sequence[Recipe], unit_bytes: float) -> list[list[Recipe]]:
    """Runs of whole blocks of at most `unit_bytes` of source, or one block.

    Recipes come sorted by block, or in the order of a GGUF, whose tensors need no partners.
    """
    units: list[list[Recipe]] = []
    size = 0
    for _, run in groupby(recipes, key=lambda recipe: recipe.block):
        block = list(run)
        block_bytes = sum(recipe.source_bytes for recipe in block)
        if not units or size + block_bytes > unit_bytes:
            units.append([])
            size = 0
        units[-1].extend(block)
        size += block_bytes
    return units


def _files(
    target: Target, checkpoint: Checkpoint, shares: Sequence[Sequence[Placed]]
) -> Sequence[tuple[OutputFile, ...]]:
    """For each unit a file of what it writes, if anything, and those that its consumer wants apart.

    Raises:
        BadSpec: none has, or the container cannot hold what there is.
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
            placed.recipe.name,
            placed.action,
            placed.scheme,
            placed.cast,
            {role: _slot(places[tensor.name], tensor) for role, tensor in placed.stored.items()},
            {role: t.spec.constant for role, t in placed.stored.items() if t.spec.constant is not None},
            placed.order,
        )
        for placed in share
    )
    return UnitOutput(files, placements)


def _slot(place: Slot, tensor: StoredTensor) -> Slot:
    """A stored tensor's own place: its file's, or a part of that."""
    if tensor.whole is None:
        return place
    name, at = f"{place.name}@{tensor.offset}", place.offset + tensor.offset
    return Slot(name, tensor.spec.dtype, tensor.spec.shape, at, within=(place.name, tensor.offset))


def _files_of(recipes: Iterable[Recipe], tags: Mapping[str, FileTag]) -> tuple[FileTag, ...]:
    return tuple(sorted({tags[spec.file] for recipe in recipes for _, spec in recipe.stored}))


def json_bytes(document: Any) -> bytes:
    """As transformers writes JSON files."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
