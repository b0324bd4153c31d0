"""The contract of a quantization scheme, and the three things it works with.

A scheme is a function from a view to a sink. It reads flat ranges of weights where and as often as it wants, holds a
few MiB of them, and writes what its engine stores. It knows exactly which tensors those are before it has read any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np

from loaders.quantization.grid import Grid
from loaders.quantization.kernels import Kernels
from loaders.specs import StoredSpec, TensorSpec

Block = np.ndarray  # raw weights: bfloat16 as uint16
T = TypeVar("T")


class View(Protocol):
    """A tensor's weights."""

    @property
    def spec(self) -> TensorSpec: ...

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        """Flat items [start, stop), raw. Valid until this thread reads into the same slot again."""
        ...


class Stored(Protocol):
    """What a scheme has stored for one tensor, to be read back."""

    def read(self, role: str, start: int, stop: int) -> Block:
        """Flat items [start, stop) of a role. Valid until this thread reads the same role again."""
        ...


class Sink(Protocol):
    """Takes what a scheme stores for one tensor."""

    def write(self, role: str, start: int, data: Block) -> None:
        """Put items at flat item `start` of a role. Threads may write at once; a bound role is written in one go."""
        ...


class Work(Protocol):
    """A scheme's tools: kernels of the backend, this thread's reusable arrays, and loops over ranges."""

    @property
    def kernels(self) -> Kernels: ...

    def array(self, name: str, count: int, dtype: Any) -> np.ndarray:
        """An uninitialized array; the same memory whenever this thread asks for the name again."""
        ...

    def sweep(self, count: int, align: int, body: Callable[[int, int], T]) -> list[T]:
        """Call body(start, stop) for ranges that cut [0, count) at multiples of `align`; results in range order.

        The cut depends on the arguments alone; which threads run the ranges, and when, is open.
        """
        ...


class Decoder(Protocol):
    """The reading half of a quantization method, with its parameters: a frozen value."""

    kind: ClassVar[str]

    def align(self, spec: TensorSpec) -> int:
        """Items at whose multiples `decode` may start."""
        ...

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        """The float32 values of items [start, stop), into out (stop - start,)."""
        ...


@runtime_checkable
class BoxDecoder(Decoder, Protocol):
    """A decoder that finds any rows and columns without decoding what lies between: see `quantization/boxes.py`."""

    def decode_box(
        self, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
    ) -> None:
        """The float32 values where `rows` and `columns` (step 1) meet, into out (rows, columns), row-major.

        Rows are those of all matrices of a stack, one after another: a shape (..., R, C) has ... * R of them.
        """
        ...


class Scheme(Decoder, Protocol):
    """A quantization method with its parameters: a frozen value."""

    engine: ClassVar[str]  # whose format it writes: decides layout, default rules and the config block
    backends: ClassVar[tuple[str, ...]]  # where its encoder runs

    def refuses(self, spec: TensorSpec) -> str | None:
        """Why this tensor cannot be stored, or None."""
        ...

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        """By role, exactly (or at most) what will be stored. Roles are the suffixes that the engine uses."""
        ...

    def state_bytes(self, spec: TensorSpec) -> int:
        """Memory held between ranges while a tensor is encoded."""
        ...

    def encode(self, view: View, sink: Sink, work: Work) -> None: ...

    @property
    def error_limit(self) -> float:
        """The greatest relative error, sqrt(sum e^2 / sum x^2), that a right encoding can have."""
        ...


@runtime_checkable
class Floored(Protocol):
    """A scheme whose scales cannot be as small as weights can."""

    @property
    def error_floor(self) -> float:
        """The root mean square error, beside `error_limit`'s share, that a right encoding of tiny weights can have."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """A scheme whose stored scales say how far any one weight may be off.

    `error_limit` bounds a tensor's sum, in which one wrong code among millions is lost; this bounds each weight.
    """

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """The greatest error of a finite weight of this range that a right encoding can have. `spec` is what was
        encoded; a cast to it from a wider dtype is allowed for.
        """
        ...


@runtime_checkable
class Gridded(Protocol):
    """A scheme that takes the nearest of the values that a group's stored scales allow: see `quantization/grid.py`."""

    def grid(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> Grid | None:
        """That of items [start, stop), multiples of `align`, from the scales that are stored for them. `spec` is what
        was encoded. None where there is nothing but a cast.
        """
        ...


@runtime_checkable
class Sharing(Protocol):
    """A scheme whose fused partners (q/k/v, gate/up) must have something in common."""

    def share(self, views: Sequence[View], work: Work) -> Scheme:
        """This scheme, knowing what the partners share. `views` are all of one fused group that the scheme encodes."""
        ...
