"""The interface of a layout: what a consumer of checkpoints expects of names, files, config.json and index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers.gguf import MetadataValue
from loaders.containers.pytorch_pieces import Tail
from loaders.rules.rule import Decision, Rule
from loaders.specs import OutputFile, StoredTensor
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor


def module_of(weight: str) -> str:
    """Return the name of the module to which a weight belongs."""
    return weight.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor's encoding as a layout wants it, and what each role of the result is called."""

    encoding: Encoding
    stored: Mapping[str, StoredTensor]

    @property
    def tensor(self) -> LogicalTensor:
        return self.encoding.tensor


class Layout(Protocol):
    """A consumer's expectations. Its methods raise BadSpec for what the consumer could not load."""

    name: ClassVar[str]
    containers: ClassVar[tuple[str, ...]]  # the kinds of weight files that the consumer reads, the usual one first
    file: ClassVar[str | None]  # the one weight file that it reads; None: a file a unit, named by the container

    def place(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> tuple[Placed, ...]:
        """Return what will be stored under which names: one entry for each decision that is not "drop"."""
        ...

    def about(self, checkpoint: Checkpoint, placed: Sequence[Placed]) -> Any:
        """Return the metadata of a file of these tensors, in the form that its container takes; mostly None."""
        ...

    def warnings(self, decisions: Sequence[Decision]) -> tuple[str, ...]:
        """Return what the user should know of the consumer before anything is written."""
        ...

    def config(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None
    ) -> dict[str, Any] | None:
        """Return the output's config.json, or None if it has none."""
        ...

    def index(self, files: Sequence[OutputFile], total_bytes: int, parameters: int) -> Mapping[str, Any] | None:
        """Return the output's index, or None if it has none.

        `total_bytes` are the bytes of all tensors, `parameters` the number of weights before they were quantized.
        """
        ...


@runtime_checkable
class Forming(Protocol):
    """A layout whose engine holds some tensors in another form than checkpoints have."""

    def formed(self, checkpoint: Checkpoint, tensors: Sequence[LogicalTensor]) -> Sequence[LogicalTensor]:
        """Return the tensors as the engine holds them, for rules to decide about: cut, arranged anew, or changed."""
        ...

    def left_out(self, checkpoint: Checkpoint) -> tuple[Rule, ...]:
        """Return the rules that drop what the engine has not; they go before an engine's own."""
        ...

    def no_next_tokens(self, checkpoint: Checkpoint) -> str | None:
        """Say why the engine has no place for layers for multi-token prediction; None if it has."""
        ...


@dataclass(frozen=True, slots=True)
class Joined:
    """The one file of which the units' pieces are ranges: its name, the bytes before the first, and what follows."""

    name: str
    head: bytes
    tail: Tail | None = None


@dataclass(frozen=True, slots=True)
class Assembly:
    """The units' files after their layout has seen all of them, in the same order, and the files that it adds.

    `made` are small files by name. `joined` is the file of which the units' files are pieces, if they are. `notes` say
    what of the source the engine will not get.
    """

    files: tuple[OutputFile, ...]
    made: Mapping[str, bytes]
    joined: Joined | None
    notes: tuple[str, ...] = field(default=(), repr=False)  # A job's key is made of what the output holds.


@runtime_checkable
class Assembling(Protocol):
    """A layout whose files depend on each other, so that it must see all of them before their headers are known."""

    def aux(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Return the source's other files that are copied into the output."""
        ...

    def assemble(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], files: Sequence[OutputFile], naming: Naming
    ) -> Assembly:
        """Put the units' files together: names, headers, manifests, or one file of which they are pieces."""
        ...


@dataclass(frozen=True, slots=True)
class Naming:
    """A job's choices of names: the model's, the quantization's, and whether there is one file or one a unit.

    `metadata` is what a GGUF says besides about how it was made.
    """

    model: str
    label: str | None
    split: bool
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
