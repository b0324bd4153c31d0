"""One tensor's trip: what becomes of it, and taking it there; encode, decode what was stored, compare.

A job's units, the measuring of `quant=auto`, `load_weights` and models all take tensors this way, so that what is
measured is what is written, and what is loaded is what a job would have stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from loaders.clock import Clock
from loaders.dtypes import DType
from loaders.quantization.fused_group import FusedGroups
from loaders.quantization.measure import measure
from loaders.quantization.scheme import Scheme, Sink, Stored, View, Work
from loaders.specs import RowOrder, StoredSpec, TensorSpec
from loaders.stats import ErrorSums
from loaders.strategies import Reader
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.views import encoded_view, numbers_view, ordered_view, view_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """What becomes of a logical tensor.

    `action` is "quantize", "cast" or "keep". `cast` is the dtype that the weights take before the scheme sees them, as
    the engine's own loading would. `order` is the engine's order of rows, where it is another than the tensor's.
    """

    tensor: LogicalTensor
    action: str
    scheme: Scheme
    cast: DType | None = None
    order: RowOrder | None = None

    @property
    def spec(self) -> TensorSpec:
        """What the scheme sees: the tensor's weights after the cast."""
        return self.tensor.spec if self.cast is None else replace(self.tensor.spec, dtype=self.cast)

    @property
    def stored(self) -> Mapping[str, StoredSpec]:
        """What the scheme stores, by role."""
        return self.scheme.stored(self.spec)

    @property
    def state_bytes(self) -> int:
        """Memory that the scheme holds while it encodes this."""
        return self.scheme.state_bytes(self.spec)


class Parts(Sink, Stored, Protocol):
    """Where a tensor's parts go, and from where they are read back: a file under way, or memory."""


class TensorEncoder:
    """Takes the tensors of an open source through their schemes.

    A fused group's partners are found among `encodings`; schemes that share nothing over a group do not need them. With
    a clock, reading counts apart from encoding and measuring.
    """

    def __init__(
        self, reader: Reader, work: Work, encodings: Iterable[Encoding] = (), clock: Clock | None = None
    ) -> None:
        self._reader = reader
        self._work = work
        self._clock = clock or Clock()
        self._shared = FusedGroups()
        self._partners: dict[str, list[Encoding]] = {}
        for each in encodings:
            if each.tensor.group is not None:
                self._partners.setdefault(each.tensor.group, []).append(each)

    def encode(self, encoding: Encoding, sink: Sink, *, threads: int = 1) -> None:
        """Store a tensor as its scheme does, with so many threads at work on it."""
        with self._clock.phase("encode", threads):
            scheme = self._scheme(encoding)
            scheme.encode(self._seen(encoding), sink, self._work)

    def measure(
        self,
        encoding: Encoding,
        stored: Stored,
        on_bytes: Callable[[int], None] = lambda count: None,
        *,
        threads: int = 1,
    ) -> ErrorSums:
        """How far what was stored lies from the source, decoded again: see `measure`."""
        with self._clock.phase("measure", threads):
            numbers = self.numbers(encoding, "reread")
            return measure(numbers, encoding.scheme, encoding.spec, stored, self._work, on_bytes)

    def numbers(self, encoding: Encoding, phase: str = "read") -> View:
        """The weights in the engine's order of rows, before any cast: what errors are measured against."""
        view = view_of(encoding.tensor, self._reader, self._work, clock=self._clock, phase=phase)
        return numbers_view(ordered_view(view, encoding.order), encoding.cast, self._work)

    def _seen(self, encoding: Encoding) -> View:
        return encoded_view(self.numbers(encoding), encoding.cast)

    def _scheme(self, encoding: Encoding) -> Scheme:
        """The scheme with what it shares over the tensor's fused group."""
        tensor, scheme = encoding.tensor, encoding.scheme
        partners = self._partners.get(tensor.group or "", [encoding])
        views = lambda: [self._seen(each) for each in partners if each.scheme == scheme]  # noqa: E731
        return self._shared.scheme_of(tensor.group or tensor.name, scheme, views, self._work)
