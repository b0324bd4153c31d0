"""What every layout offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.containers.pytorch_pieces import Tail
from loaders.rules.rule import Decision
from loaders.specs import OutputFile, StoredTensor
from loaders.tensors.encoding import Encoding
from loaders.tensors.logical_tensor import LogicalTensor


def module_of(weight: str) -> str:
    """The module that a weight belongs to."""
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
    """A consumer's expectations. Refuses, as BadSpec, what the consumer could not load."""

    name: ClassVar[str]
    containers: ClassVar[tuple[str, ...]]  # the kinds of weight files it reads, the usual one first
    file: ClassVar[str | None]  # the one weight file that it reads; None: one a unit, called as its container's are

    def place(self, checkpoint: Checkpoint, decisions: Sequence[Decision]) -> tuple[Placed, ...]:
        """What will be stored, and under which names: one for each decision that is not "drop"."""
        ...

    def about(self, checkpoint: Checkpoint, placed: Sequence[Placed]) -> Any:
        """What a file of these results says beside its tensors, as its container takes it; mostly nothing."""
        ...

    def warnings(self, decisions: Sequence[Decision]) -> tuple[str, ...]:
        """What to know of the consumer before anything is written."""
        ...

    def config(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], compute_dtype: str | None
    ) -> dict[str, Any] | None:
        """config.json; None where there will be none."""
        ...

    def index(self, files: Sequence[OutputFile], total_bytes: int, parameters: int) -> Mapping[str, Any] | None:
        """The index; None where there will be none. `total_bytes` are those of all tensors, `parameters` the numbers
        in them before they were quantized.
        """
        ...


@dataclass(frozen=True, slots=True)
class Joined:
    """The one file that the units' pieces are ranges of: its name, the bytes before the first of them, and what is made
    of them to follow the last.
    """

    name: str
    head: bytes
    tail: Tail | None = None


@dataclass(frozen=True, slots=True)
class Assembly:
    """What the units' files are once their layout has seen them all, in the same order, and what comes to them."""

    files: tuple[OutputFile, ...]
    made: Mapping[str, bytes]
    joined: Joined | None


@runtime_checkable
class Assembling(Protocol):
    """A layout whose files know of each other: it says which aux files go along, and puts the rest together."""

    def aux(self, checkpoint: Checkpoint) -> tuple[str, ...]: ...

    def assemble(
        self, checkpoint: Checkpoint, decisions: Sequence[Decision], files: Sequence[OutputFile], naming: Naming
    ) -> Assembly: ...


@dataclass(frozen=True, slots=True)
class Naming:
    """What a job says of its files: the model's name, what its quantization is called, one file or one a unit."""

    model: str
    label: str | None
    split: bool
