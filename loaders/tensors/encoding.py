"""The encoding of one tensor: its scheme and dtype, encoding it, decoding what was stored, and comparing the two.

A job's units, the measurements of `quant=auto`, `load_weights` and the model loaders all encode tensors here, so that
what is measured is what is written, and what is loaded is what a job would have stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loaders.clock import Clock
from loaders.dtypes import DTYPES, DType
from loaders.imatrix.matrix import TensorImportance
from loaders.quantization.fused_group import FusedGroups
from loaders.quantization.scheme import Scheme, Sharing, Sink, Stored, View, Work, fits, stored_specs
from loaders.quantization.schemes.ggml import Ggml
from loaders.specs import RowOrder, StoredSpec, TensorSpec
from loaders.stats import ErrorSums
from loaders.tensors.logical_tensor import LogicalTensor
from loaders.tensors.repacked import holds_mxfp4, repack
from loaders.tensors.views import StoredRoles, encoded_view, numbers_view, ordered_view, view_of

if TYPE_CHECKING:
    from loaders.quantization.measure import Parts
    from loaders.strategies import Reader  # all strategies, which settings and rules do without


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """The way in which a logical tensor is stored.

    `action` is "quantize", "cast" or "keep". `cast` is the dtype to which weights are cast before the scheme gets them,
    as the engine's own tools do. `order` is the engine's order of rows, if it differs from the tensor's. `importance`
    is where the importances of its input channels lie, for a scheme that goes by them.
    """

    tensor: LogicalTensor
    action: str
    scheme: Scheme
    cast: DType | None = None
    order: RowOrder | None = None
    importance: TensorImportance | None = None

    @property
    def spec(self) -> TensorSpec:
        """The spec of the tensor that the scheme gets: after the cast."""
        tensor = self.tensor
        return TensorSpec(tensor.name, self.cast or tensor.dtype, tensor.shape)

    @property
    def stored(self) -> Mapping[str, StoredSpec]:
        """The tensors that the scheme stores, by role."""
        return stored_specs(self.scheme, self.cast or self.tensor.dtype, self.tensor.shape)

    @property
    def numbers_bytes(self) -> int:
        """The bytes of the weights as `TensorEncoder.numbers` gives them, which progress counts."""
        spec = self.tensor.spec
        is_decoded = self.cast is not None and spec.dtype.block > 1
        return spec.numel * DTYPES["F32"].item_bytes if is_decoded else spec.size

    @property
    def state_bytes(self) -> int:
        """The bytes that the scheme holds while it encodes the tensor, and what is merged into it."""
        merge = self.tensor.merge
        return self.scheme.state_bytes(self.spec) + (0 if merge is None else merge.state_bytes)


class TensorEncoder:
    """An encoder for the tensors of an open source.

    A scheme that shares scales over a fused group needs the group's other tensors, and finds them among `encodings`;
    other schemes do not need them. With a clock, reading counts apart from encoding and measuring.
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

    def encode(
        self, encoding: Encoding, parts: Parts, on_bytes: Callable[[int], None] = lambda count: None
    ) -> ErrorSums:
        """Encode a tensor, write its parts, and return the error of what was stored: see `measure`."""
        from loaders.quantization.measure import encode_and_measure  # kernels, which planning does without

        if self._is_repacked(encoding):
            self._repack(encoding, parts)
            return self.measure(encoding, parts, on_bytes)
        return encode_and_measure(
            self.numbers(encoding),
            lambda view: encoded_view(view, encoding.cast),
            self._scheme(encoding),
            encoding.stored,
            parts,
            self._work,
            on_bytes,
            self._clock,
        )

    def encode_only(self, encoding: Encoding, sink: Sink) -> None:
        """Encode a tensor and write its parts, without a look at what was stored."""
        with self._clock.phase("encode"):
            if self._is_repacked(encoding):
                self._repack(encoding, sink)
            else:
                self._scheme(encoding).encode(self._seen(encoding), sink, self._work)

    def measure(
        self, encoding: Encoding, stored: Stored, on_bytes: Callable[[int], None] = lambda count: None
    ) -> ErrorSums:
        """Decode what was stored and compare it with the source: see `measure`."""
        from loaders.quantization.measure import measure  # kernels, which planning does without

        numbers = self.numbers(encoding)
        return measure(numbers, encoding.scheme, encoding.spec, stored, self._work, on_bytes)

    @staticmethod
    def _is_repacked(encoding: Encoding) -> bool:
        return encoding.scheme == Ggml("MXFP4") and holds_mxfp4(encoding.tensor) and encoding.order is None

    def _repack(self, encoding: Encoding, sink: Sink) -> None:
        tensor = encoding.tensor
        repack(tensor, StoredRoles(self._reader, dict(tensor.stored), self._clock), sink, self._work)

    def numbers(self, encoding: Encoding) -> View:
        """Return the source's weights in the engine's order of rows, before any cast: the reference for errors."""
        view = view_of(encoding.tensor, self._reader, self._work, clock=self._clock)
        return numbers_view(ordered_view(view, encoding.order), encoding.cast, self._work)

    def _seen(self, encoding: Encoding) -> View:
        return encoded_view(self.numbers(encoding), encoding.cast)

    def _scheme(self, encoding: Encoding) -> Scheme:
        """Return the scheme, completed by the tensor's importances, or by what it shares over its fused group."""
        tensor, scheme = encoding.tensor, encoding.scheme
        if encoding.importance is not None:
            assert isinstance(scheme, Ggml), scheme
            with self._clock.phase("read"):
                return replace(scheme, importance=encoding.importance.read())
        if not fits(scheme, Sharing):
            return scheme
        partners = self._partners.get(tensor.group or "", [encoding])

        def views() -> list[View]:
            return [self._seen(each) for each in partners if each.scheme == encoding.scheme]

        return self._shared.scheme_of(tensor.group or tensor.name, scheme, views, self._work)
