"""Plans: the units of work of a pass over a checkpoint, and the place of every output byte. Immutable data.

Units of whole blocks depend on the source and its family alone. So any set of targets of one checkpoint has the same
units, and a sweep and a single job can resume each other's work. A block that is larger than a unit is cut, but not
through what the target puts together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jobs.planning.targets import Target, TargetId
from jobs.planning.work_key import fields_of, work_key
from loaders.backends.threads import RANGE, THREAD_BYTES
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.checkpoints.quantized_by import METHOD_FILES
from loaders.imatrix.matrix import ImportanceMatrix
from loaders.layouts import Assembling, Assembly
from loaders.quantization.schemes.plain import Plain
from loaders.rules.rule import Decision
from loaders.specs import OutputFile, Slot
from loaders.storage.base import Entry
from loaders.tensors.encoding import Encoding
from loaders.tensors.formed import FormedTensor
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.merged import MERGE_BYTES
from loaders.tensors.sources import Sources

# The version of plans, records and reports (`format` in weightmill.json); those of another version are refused. It is
# raised when a digest changes, sums of errors are added in another order, or the report gets a required field, since
# older files would then be taken for damaged.
FORMAT = 3


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
        """The tensor's name."""
        return self.encoding.tensor.name


@dataclass(frozen=True, slots=True)
class UnitOutput:
    """A unit's output for one target: its files or pieces of files; none if all its tensors are dropped."""

    files: tuple[OutputFile, ...]
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Unit:
    """A unit of work: a run of whole decoder blocks, or a part of a large one, read once for all targets."""

    id: str
    sources: tuple[Entry, ...]
    tensors: tuple[LogicalTensor, ...]
    outputs: Mapping[TargetId, UnitOutput]

    @cached_property
    def source_bytes(self) -> int:
        return sum(tensor.source_bytes for tensor in self.tensors)

    def key(self, target: TargetId) -> str:
        """Return a digest of the unit's work for a target. A record with another key is of other work."""
        if target not in self._keys:
            self._keys[target] = self._key(target)
        return self._keys[target]

    @cached_property
    def _keys(self) -> dict[TargetId, str]:
        return {}

    def _key(self, target: TargetId) -> str:
        output = self.outputs[target]
        formed = [p.encoding.tensor for p in output.placements if isinstance(p.encoding.tensor, FormedTensor)]
        tensors = [fields_of(tensor) for tensor in (*self.tensors, *formed)]
        return work_key(FORMAT, self.sources, tensors, output)

    def memory_bytes(self, threads: int) -> int:
        """Return the most bytes that running the unit holds, besides the libraries; each thread may open a tensor."""
        encodings = (p.encoding for output in self.outputs.values() for p in output.placements)
        state = sum(sorted(encoding.state_bytes for encoding in encodings)[-threads:])
        each = THREAD_BYTES + (RANGE * MERGE_BYTES if any(r.merge is not None for r in self.tensors) else 0)
        return threads * each + state


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """A target's plan: the decision about each tensor, and all files of its output except copied auxiliary files."""

    target: Target
    decisions: tuple[Decision, ...]
    files: tuple[OutputFile, ...]
    stored: Mapping[str, tuple[Slot, ...]]  # the slots of each tensor
    config: Mapping[str, Any] | None
    warnings: tuple[str, ...]
    assembly: Assembly | None = None
    imatrix: ImportanceMatrix | None = None  # by which a GGUF is quantized
    made: Mapping[str, bytes] = field(default_factory=dict)  # auxiliary files made from the source's metadata

    @cached_property
    def finals(self) -> tuple[OutputFile, ...]:
        """The output's weight files: those of the units, and the file whose ranges are the pieces."""
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

    @cached_property
    def pieces(self) -> tuple[OutputFile, ...]:
        """The ranges of a file that several units write, in order."""
        return tuple(file for file in self.files if file.within is not None)

    @property
    def shared(self) -> OutputFile | None:
        """The file whose ranges are the pieces, if there is one."""
        return self.finals[0] if self.pieces else None

    @cached_property
    def parameters(self) -> int:
        """The number of weights in all tensors that are written."""
        return sum(math.prod(d.tensor.shape) for d in self.decisions if d.action != "drop")

    @cached_property
    def tensor_bytes(self) -> int:
        """The bytes of all stored tensors; an upper bound if a length depends on values."""
        return sum(file.tensor_bytes for file in self.files)

    @cached_property
    def weight_bytes(self) -> int:
        """The bytes of all weight files, headers included; an upper bound if a length depends on values."""
        return sum(file.size for file in self.finals)

    @cached_property
    def slack_bytes(self) -> int:
        """The bytes by which files may be smaller than planned, because lengths of some tensors depend on values."""
        return sum(SLACK for file in self.files for slot in file.slots if slot.is_bound)


# The most bytes by which one tensor of variable length can shrink. Such tensors are texts with a number in them, which
# may have fewer characters, and the padding after it.
SLACK = 64


@dataclass(frozen=True)
class Plan:
    """The plan of a pass over one checkpoint, for all its targets."""

    checkpoint: Checkpoint
    sources: Sources
    units: tuple[Unit, ...]
    targets: Mapping[TargetId, TargetPlan]

    @cached_property
    def source_bytes(self) -> int:
        return sum(unit.source_bytes for unit in self.units)

    @cached_property
    def aux(self) -> tuple[str, ...]:
        """The auxiliary files that may be copied. If weights are decoded or quantized, those that describe the source's
        quantization are left out, since engines would believe them.
        """
        is_new = any(tensor.decode is not None for tensor in self.sources.tensors)
        is_new = is_new or any(not isinstance(plan.target.scheme, Plain) for plan in self.targets.values())
        return tuple(name for name in self.checkpoint.aux if not (is_new and name in METHOD_FILES))

    def aux_of(self, target: TargetPlan) -> tuple[str, ...]:
        """Return the auxiliary files that the target's layout wants."""
        layout = target.target.layout
        wanted = layout.aux(self.checkpoint) if isinstance(layout, Assembling) else self.aux
        mine = {*self.aux}
        return tuple(name for name in wanted if name in mine)

    @cached_property
    def parameters(self) -> int:
        return self.sources.parameters
