"""Views: the weights of a logical tensor through its origin, in any range and any number of times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from loaders.clock import Clock
from loaders.dtypes import DTYPES, DType, is_contiguous, storage_of
from loaders.quantization.boxes import decode_window
from loaders.quantization.kernels import casts
from loaders.quantization.read_only.ggml import decode_blocks
from loaders.quantization.scheme import Block, Decoder, View, Work
from loaders.specs import RowOrder, TensorSpec, WeightSpec
from loaders.tensors.form_values import VALUES
from loaders.tensors.formed import Change, FormedTensor
from loaders.tensors.logical_tensor import LogicalTensor, Window
from loaders.tensors.merged import MergedView

if TYPE_CHECKING:
    from loaders.strategies import Reader  # all strategies, which settings and rules do without


class StoredView:
    """The weights of a plain stored tensor; see `View`."""

    def __init__(
        self,
        reader: Reader,
        spec: TensorSpec,
        stored: WeightSpec,
        window: Window,
        clock: Clock | None = None,
    ) -> None:
        self.spec = spec
        self._clock = clock or Clock()
        self._reader = reader
        self._stored = stored
        self._window = window
        self._storage = storage_of(spec.dtype)
        # Dtypes of less than a byte are read as bytes, which no stride of elements can address.
        self._in_place = spec.dtype.bits < 8 or is_contiguous(spec.shape, window.stride)

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        with self._clock.phase("read"):
            if not self._in_place:
                return self._gather(start, stop)
            item = self._storage.itemsize
            first = self._window.offset * item
            return self._reader.read(self._stored, first + start * item, first + stop * item, slot).view(self._storage)

    def _gather(self, start: int, stop: int) -> Block:
        """Copy elements that are not contiguous from a mapped file, whole rows of the first dimension at a time."""
        item, shape = self._storage.itemsize, self.spec.shape
        row = max(1, self.spec.numel // shape[0])
        first, last = start // row, -(-stop // row)
        wanted = self._window.rows(first), (last - first, *shape[1:])
        begin, end = wanted[0].extent(wanted[1])
        data = self._reader.mapped(self._stored, begin * item, end * item).view(self._storage)
        strides = tuple(step * item for step in self._window.stride)
        rows = np.lib.stride_tricks.as_strided(data, wanted[1], strides, writeable=False)
        return np.ascontiguousarray(rows).reshape(-1)[start - first * row : stop - first * row]


class CastView:
    """Another view's weights in another float dtype."""

    def __init__(self, view: View, dtype: DType) -> None:
        self.spec = TensorSpec(view.spec.name, dtype, view.spec.shape)
        self._view = view

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        return casts.cast(self._view.read(start, stop, slot), self._view.spec.dtype.name, self.spec.dtype.name)


class StoredRoles:
    """The tensors that a scheme stored for a weight in a checkpoint; see `Stored`."""

    def __init__(self, reader: Reader, roles: Mapping[str, WeightSpec], clock: Clock | None = None) -> None:
        self._reader = reader
        self._clock = clock or Clock()
        self._roles = roles
        # Reader slots from 100 on, so that a view's own reads, which count from 0, do not overwrite a role's.
        self._slots = {role: 100 + index for index, role in enumerate(roles)}

    def read(self, role: str, start: int, stop: int) -> Block:
        spec = self._roles[role]
        storage = storage_of(spec.dtype)
        first, last = start * storage.itemsize, min(stop * storage.itemsize, spec.size)
        with self._clock.phase("read"):
            return self._reader.read(spec, first, last, self._slots[role]).view(storage)


class DecodedView:
    """A quantized tensor's weights, decoded as they are read, and rounded to its dtype or directly to another."""

    def __init__(
        self, tensor: LogicalTensor, stored: StoredRoles, decoder: Decoder, work: Work, dtype: DType | None = None
    ) -> None:
        spec = gathered_spec(tensor)
        self.spec = spec if dtype is None else replace(spec, dtype=dtype)
        self._whole = tensor.decoded_spec
        self._window = tensor.window
        self._stored = stored
        self._decoder = decoder
        self._work = work

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        if self._window is not None and not is_contiguous(self.spec.shape, self._window.stride):
            values = self._work.array(f"decoded {slot}", stop - start, np.float32)
            window = self._window
            decode_window(
                self._decoder, self._whole, self._stored, self.spec.shape, window.offset, window.stride, start, values,
                self._work,
            )  # fmt: skip
        else:
            offset = 0 if self._window is None else self._window.offset
            values = self._flat(offset + start, offset + stop, slot)
        return casts.cast(values, "F32", self.spec.dtype.name)

    def _flat(self, start: int, stop: int, slot: int) -> np.ndarray:
        """Decode a flat range, from the multiple of `align` before it to the one after it."""
        align = self._decoder.align(self._whole)
        first = start // align * align
        last = min(-(-stop // align) * align, self._whole.numel)
        values = self._work.array(f"decoded {slot}", last - first, np.float32)
        self._decoder.decode(self._whole, self._stored, first, last, values, self._work)
        return values[start - first : stop - first]


class BlocksView:
    """Another view's blocks of one of ggml's types, decoded to float32."""

    def __init__(self, view: View, work: Work) -> None:
        self.spec = replace(view.spec, dtype=DTYPES["F32"])
        self._view = view
        self._dtype = view.spec.dtype
        self._work = work

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        block, size = self._dtype.block, self._dtype.size((self._dtype.block,))
        first, last = start // block, -(-stop // block)
        values = self._work.array(f"blocks {slot}", (last - first) * block, np.float32)
        decode_blocks(self._dtype.name, self._view.read(first * size, last * size, slot), values)
        return values[start - first * block : stop - first * block]


class ReorderedView:
    """Another view's weights with the rows of each head in another order. It reads whole heads."""

    def __init__(self, view: View, order: RowOrder) -> None:
        self.spec = view.spec
        self._view = view
        # Row t * size/2 + j of the source is element (t, j) here, and the transpose lists them as 2j + t.
        half = np.arange(order.size).reshape(2, -1)
        self._rows = half.T.reshape(-1) if not order.inverse else np.argsort(half.T.reshape(-1))

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        columns = max(1, self.spec.numel // self.spec.shape[0])
        head = columns * self._rows.size
        first, last = start // head * head, -(-stop // head) * head
        block = self._view.read(first, last, slot).reshape(-1, self._rows.size, columns)
        return block[:, self._rows].reshape(-1)[start - first : stop - first]


class FormedView:
    """The elements of a tensor in an engine's form, with the values that the engine holds."""

    def __init__(self, view: View, tensor: FormedTensor) -> None:
        self.spec = tensor.spec
        self._view = view
        self._changes = [(change.word, _by_row(change)) for change in tensor.changes]

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        block = self._view.read(start, stop, slot)
        if not self._changes:
            return block
        numbers = casts.to_float32(block, self._view.spec.dtype.name)
        for word, factors in self._changes:
            numbers = self._scaled(numbers, start, word, factors) if factors.size else VALUES[word](numbers)
        return casts.cast(numbers, "F32", self.spec.dtype.name)

    def _scaled(self, numbers: np.ndarray, start: int, word: str, by_row: np.ndarray) -> np.ndarray:
        factors = by_row
        if by_row.size > 1:
            columns = max(1, self.spec.numel // by_row.size)
            factors = by_row[np.arange(start, start + numbers.size) // columns]
        made: np.ndarray = numbers / factors if word.startswith("un") else numbers * factors
        return made


def _by_row(change: Change) -> np.ndarray:
    """Return the factor of each row; one alone where all rows have the same."""
    rows, factors = zip(*change.factors, strict=True) if change.factors else ((), ())
    found = np.array(factors, np.float32)
    return found if len(found) == 1 else np.repeat(found, np.array(rows, np.int64))


def gathered_spec(tensor: LogicalTensor) -> TensorSpec:
    """Return what is read of a tensor before its values are changed: its shape is that over which its window steps."""
    if isinstance(tensor, FormedTensor):
        return TensorSpec(tensor.name, tensor.read_as, tensor.gather)
    return tensor.spec


def ordered_view(view: View, order: RowOrder | None) -> View:
    """Return a view with its rows in an order; None leaves them."""
    return view if order is None else ReorderedView(view, order)


def view_of(
    tensor: LogicalTensor,
    reader: Reader,
    work: Work,
    decoded_dtype: DType | None = None,
    *,
    clock: Clock | None = None,
) -> View:
    """Return a tensor's weights through an open reader; weights that are decoded are in `decoded_dtype`, if given."""
    view = ordered_view(_base_view(tensor, reader, work, decoded_dtype, clock or Clock()), tensor.order)
    if isinstance(tensor, FormedTensor):
        return FormedView(view, tensor)
    return view if tensor.merge is None else MergedView(view, tensor.merge, work)


def _base_view(tensor: LogicalTensor, reader: Reader, work: Work, decoded_dtype: DType | None, clock: Clock) -> View:
    """Return a tensor's weights as they are stored or decoded, before any order or merge."""
    if tensor.decode is not None:
        roles = StoredRoles(reader, dict(tensor.stored), clock)
        return DecodedView(tensor, roles, tensor.decode, work, decoded_dtype)
    [(_, stored)] = tensor.stored
    assert tensor.window is not None
    return StoredView(reader, gathered_spec(tensor), stored, tensor.window, clock)


def numbers_view(view: View, cast: DType | None, work: Work) -> View:
    """Return a view, or the weights of its blocks where blocks of ggml are to become something else."""
    return BlocksView(view, work) if cast is not None and view.spec.dtype.block > 1 else view


def encoded_view(view: View, cast: DType | None) -> View:
    """Return the view that a scheme gets of a tensor: its weights, cast where the engine would cast them."""
    return view if cast is None else CastView(view, cast)
