"""The contract of a quantization scheme, and the three things that it works with: a view, a sink and tools.

A scheme is a function from a view to a sink. It reads flat ranges of weights, where and as often as it wants, holds a
few MiB of them at a time, and writes the tensors that its engine stores. Their names, dtypes and shapes follow from the
weight's spec alone, so that a plan can place them before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeGuard, TypeVar, runtime_checkable

import numpy as np

from loaders.dtypes import DType, Shape
from loaders.quantization.grid import Grid
from loaders.quantization.kernels import Kernels
from loaders.specs import StoredSpec, TensorSpec

Block = np.ndarray  # raw weights: bfloat16 as uint16
PartRange = tuple[str, int, int]  # a role, and flat items [start, stop) of it
T = TypeVar("T")
_FITS: dict[tuple[type, type], bool] = {}


def fits(value: object, protocol: type[T]) -> TypeGuard[T]:
    """Say what `isinstance` says of a protocol, which compares all its members, but only once for each class."""
    key = type(value), protocol
    if key not in _FITS:
        _FITS[key] = isinstance(value, protocol)
    return _FITS[key]


class View(Protocol):
    """The weights of one logical tensor, readable in any range and any number of times."""

    @property
    def spec(self) -> TensorSpec: ...

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        """Return flat items [start, stop) as raw bits, valid until this thread reads into the same slot again."""
        ...


class Stored(Protocol):
    """The tensors that a scheme has stored for one weight, by role, to be read back."""

    def read(self, role: str, start: int, stop: int) -> Block:
        """Return flat items [start, stop) of a role. They are valid until this thread reads the same role again."""
        ...


class Sink(Protocol):
    """The receiver of what a scheme stores for one tensor."""

    def write(self, role: str, start: int, data: Block) -> None:
        """Put `data` at flat item `start` of a role.

        Several threads may write at once. A role whose length is only bounded in the plan (`StoredSpec.is_bound`) is
        written by a single call.
        """
        ...


class Work(Protocol):
    """A scheme's tools: the backend's kernels, reusable arrays of the calling thread, and a loop over ranges."""

    @property
    def kernels(self) -> Kernels: ...

    def array(self, name: str, count: int, dtype: Any) -> np.ndarray:
        """Return an uninitialized array. A thread that asks for the same name again gets the same memory again."""
        ...

    def sweep(self, count: int, align: int, body: Callable[[int, int], T]) -> list[T]:
        """Call body(start, stop) for ranges that cut [0, count) at multiples of `align`; return results in range order.

        The cut depends on the arguments alone, so that sums over ranges come out the same everywhere. Which threads run
        the ranges, and in which order, is left open.
        """
        ...

    def ranges(self, count: int, align: int) -> Sequence[tuple[int, int]]:
        """Return the ranges into which `sweep` cuts [0, count), in order."""
        ...


class Decoder(Protocol):
    """The reading half of a quantization method, with its parameters: a frozen value."""

    kind: ClassVar[str]

    def align(self, spec: TensorSpec) -> int:
        """Return the number of items at whose multiples `decode` may start."""
        ...

    def decode(self, spec: TensorSpec, stored: Stored, start: int, stop: int, out: np.ndarray, work: Work) -> None:
        """Write the float32 values of items [start, stop) into out (stop - start,)."""
        ...


@runtime_checkable
class BoxDecoder(Decoder, Protocol):
    """A decoder that reaches any rows and columns without decoding what lies between: see `quantization/boxes.py`."""

    def decode_box(
        self, spec: TensorSpec, stored: Stored, rows: range, columns: range, out: np.ndarray, work: Work
    ) -> None:
        """Write the float32 values where `rows` and `columns` (of step 1) meet into out (rows, columns), row-major.

        Rows count through all matrices of a stack: a shape (E, R, C) has E * R of them.
        """
        ...


class Scheme(Decoder, Protocol):
    """A quantization method with its parameters: a frozen value."""

    engine: ClassVar[str]  # the engine whose format is written; it decides layout, default rules and the config block

    @property
    def backends(self) -> tuple[str, ...]:
        """Where the encoder runs. It stores the same bytes everywhere, but on `devices.OTHER_BYTES`.

        See `Searching` for others.
        """
        ...

    def refuses(self, spec: TensorSpec) -> str | None:
        """Say why this tensor cannot be stored, or return None."""
        ...

    def stored(self, spec: TensorSpec) -> Mapping[str, StoredSpec]:
        """Return the tensors that will be stored, by role; exact, or for a bound role the greatest length.

        Roles are the suffixes that the engine uses in its checkpoints.
        """
        ...

    def state_bytes(self, spec: TensorSpec) -> int:
        """Return the bytes of memory held between ranges while a tensor is encoded."""
        ...

    def encode(self, view: View, sink: Sink, work: Work) -> None:
        """Read the view, and write every role of `stored`, except constants, to the sink."""
        ...

    @property
    def error_limit(self) -> float:
        """The greatest relative error of a tensor, sqrt(sum e^2 / sum x^2), that a right encoding can have."""
        ...


@runtime_checkable
class RangeEncoder(Protocol):
    """A scheme that encodes range by range, so that a range can be measured as soon as it is encoded."""

    def range_align(self, spec: TensorSpec) -> int | None:
        """Return the alignment of the sweep in which `encode` writes, in one call of its body, all that a range needs.

        The ranges are of the flattened weights, and multiples of `align`. Roles that all ranges share are written
        before. None means that with these settings it takes several sweeps.
        """
        ...


@runtime_checkable
class Searching(Protocol):
    """A scheme that searches for its codes, and on some devices may find others, whose error is the same to 0.1 %.

    Such a device is taken only if it is asked for, and its output is another one than the CPU's: a job that resumes
    goes on where it began.
    """

    @property
    def searched_on(self) -> tuple[str, ...]:
        """The backends on which it does, which are not among `backends`."""
        ...


def searched_on(scheme: Scheme) -> tuple[str, ...]:
    """Return the backends on which a scheme's encoder may find other codes than on the CPU."""
    return scheme.searched_on if fits(scheme, Searching) else ()


@runtime_checkable
class Floored(Protocol):
    """A scheme whose scales have a least value, so that weights far below it are lost altogether."""

    @property
    def error_floor(self) -> float:
        """The root mean square error that a right encoding of tiny weights may have beyond `error_limit`."""
        ...


@runtime_checkable
class Bounded(Protocol):
    """A scheme whose stored scales say how far any single weight may be off.

    `error_limit` bounds the error of a whole tensor, in which one wrong code among millions is lost; this bound is for
    each weight.
    """

    def greatest_error(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> float:
        """Return the greatest absolute error that a right encoding can leave on a finite weight of items [start, stop).

        `spec` is what was encoded; the bound allows for a cast to its dtype from a wider one.
        """
        ...


@runtime_checkable
class Gridded(Protocol):
    """A scheme that takes the nearest of the values that a group's stored scales allow: see `quantization/grid.py`."""

    def grid(self, spec: TensorSpec, stored: Stored, start: int, stop: int) -> Grid | None:
        """Return the grid of items [start, stop), multiples of `align`, from the scales that are stored for them.

        `spec` is what was encoded. None means that there is no grid: weights are only cast, or another bound is used.
        """
        ...


@runtime_checkable
class Compared(Protocol):
    """A scheme that decodes and compares in one compiled call, by tiles that a core's first cache holds."""

    def compare(
        self, spec: TensorSpec, stored: Stored, start: int, stop: int, block: Block, source: str, sums: np.ndarray
    ) -> bool:
        """Add the differences of `block` and of what `decode` gives for items [start, stop) to `sums`.

        `sums` are those of kernels/compare.py. `block` holds raw weights of dtype `source`, another one than that of
        `spec` where they were cast before they were encoded. A scheme with a `grid` checks it too. False says that
        nothing was done, since with these settings the scheme has no such call.
        """
        ...


@runtime_checkable
class DecodedOnDevice(Protocol):
    """A scheme that a torch device decodes, too, where its codes lie already."""

    def parts_on_device(self, spec: TensorSpec, start: int, stop: int) -> Sequence[PartRange] | None:
        """Return the roles and items that items [start, stop) of the weights are decoded from.

        None says that with these settings, or for this range, the scheme has no such decoder.
        """
        ...

    def decode_on_device(self, spec: TensorSpec, parts: Sequence[Any], count: int) -> Any:
        """Return `count` float32 values, a torch tensor: those of `decode`.

        `parts` are the bytes of what `parts_on_device` says, torch tensors of uint8. Nothing may depend on values in
        the CPU's memory but for the settings: on CUDA the operations are recorded once and done again for other ranges.
        """
        ...


@runtime_checkable
class LeavesRagged(Protocol):
    """A scheme whose engine takes layers that stay plain, and so those with rows that no groups divide."""

    def is_ragged(self, spec: TensorSpec) -> bool:
        """Whether a tensor is refused for this alone, that groups do not divide its rows."""
        ...


@runtime_checkable
class Grouped(Protocol):
    """A scheme whose user chooses the size of its groups, which must divide rows."""

    group_sizes: ClassVar[tuple[int, ...]]

    @property
    def group_size(self) -> int: ...


@runtime_checkable
class Sharing(Protocol):
    """A scheme whose fused partners (q/k/v, gate/up) must have something in common, such as one scale."""

    def share(self, views: Sequence[View], work: Work) -> Scheme:
        """Return this scheme with what the partners share filled in.

        `views` are all members of one fused group that the scheme encodes.
        """
        ...


def stored_specs(scheme: Scheme, dtype: DType, shape: Shape) -> Mapping[str, StoredSpec]:
    """Return what a scheme stores, which names do not change: a model has many tensors and few shapes."""
    # Schemes are frozen dataclasses, which mypy does not see in the protocol.
    return _stored_specs(scheme, dtype, shape)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _stored_specs(scheme: Scheme, dtype: DType, shape: Shape) -> Mapping[str, StoredSpec]:
    return MappingProxyType(dict(scheme.stored(TensorSpec("", dtype, shape))))


def error_limit(scheme: Scheme) -> float:
    """Return a scheme's `error_limit`, which every tensor is held against."""
    return _error_limit(scheme)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _error_limit(scheme: Scheme) -> float:
    return scheme.error_limit
