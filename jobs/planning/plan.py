"""Plans: from a checkpoint's headers and the wanted targets to units of work and the place of every output byte.

Pure data from pure functions. Units are cut from the source and its family alone, so any set of targets over one
checkpoint has the same units, and a sweep and a single job can resume each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.planning.targets import Target, TargetId
from loaders.backends.threads import THREAD_BYTES
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.layouts import Assembling, Assembly
from loaders.rules.rule import Decision
from loaders.specs import OutputFile, Slot
from loaders.storage.base import Entry
from loaders.storage.hashes import text_digest
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.quantized_sources import METHOD_FILES
from loaders.tensors.sources import Sources

FORMAT = 2  # of plans and records: another version's are refused


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor's encoding, and the bytes of the output that its results fill: slots by role.

    `constants` are the bytes of those roles that do not depend on weights.
    """

    encoding: Encoding
    slots: Mapping[str, Slot]
    constants: Mapping[str, bytes]

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.encoding.tensor.name


@dataclass(frozen=True, slots=True)
class UnitOutput:
    """A unit's share of a target: its files or pieces of files, none if all its tensors are dropped."""

    files: tuple[OutputFile, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of whole blocks, read once for all targets."""

    id: str
    sources: tuple[Entry, ...]
    tensors: tuple[LogicalTensor, ...]
    outputs: Mapping[TargetId, UnitOutput]

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source_bytes for tensor in self.tensors)

    def key(self, target: TargetId) -> str:
        """Names the work that this unit is for a target: a record with another key is of other work."""
        output = self.outputs[target]
        return text_digest(f"{FORMAT} {self.sources!r} {self.tensors!r} {output!r}")

    def memory_bytes(self, threads: int) -> int:
        """What running it holds at most, beyond the libraries."""
        encodings = (p.encoding for output in self.outputs.values() for p in output.placements)
        state = max((encoding.state_bytes for encoding in encodings), default=0)
        return threads * THREAD_BYTES + state


@dataclass(frozen=True, slots=True, kw_only=True)
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
            name=joined.name,
            header_bytes=len(joined.head),
            data_bytes=at,
            slots=tuple(slots),
            container=pieces[0].container,
            tail_bytes=tail,
            about=joined.head or None,
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
        return sum(d.tensor.spec.numel for d in self.decisions if d.action != "drop")

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
        is_decoded = any(tensor.decode is not None for tensor in self.sources.tensors)
        return tuple(name for name in self.checkpoint.aux if not (is_decoded and name in METHOD_FILES))

    def aux_of(self, target: TargetPlan) -> tuple[str, ...]:
        """Those of them that the target's layout wants."""
        layout = target.target.layout
        wanted = layout.aux(self.checkpoint) if isinstance(layout, Assembling) else self.aux
        return tuple(name for name in wanted if name in self.aux)

    @property
    def parameters(self) -> int:
        """Numbers in all float weights."""
        return sum(r.spec.numel for r in self.sources.tensors if r.dtype.is_float)
