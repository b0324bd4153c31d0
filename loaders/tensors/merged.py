"""Weights with an adapter merged into them: the float32 sum, rounded once to the base's dtype, in any range.

Only the factors of one tensor are in memory, and a range of it. Every factor is a window of a tensor of the adapter, so
that linear layers, convolutions, embeddings and stacks of experts are all one case: left @ right, matrix by matrix.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from loaders.dtypes import Shape, storage_of
from loaders.quantization.kernels import casts
from loaders.quantization.scheme import Block, View, Work
from loaders.specs import WeightSpec

if TYPE_CHECKING:
    from loaders.checkpoints.adapter import AdapterFile  # checkpoints, which settings and rules do without

MERGE_BYTES = 10  # bytes a weight of a range that a thread holds: the sum, and what the adapter has for this range
SPAN = 1 << 20  # weights in a range, while the norms of columns are taken
NORMS = 999  # the slot of these reads, which no other read of the same view uses


@dataclass(frozen=True, slots=True)
class Factor:
    """A stack of matrices (E, R, C) in a tensor of an adapter: element `offset` is its first, `stride` in elements."""

    stored: WeightSpec
    offset: int
    shape: Shape
    stride: Shape

    @property
    def size(self) -> int:
        """The bytes of the stack as float32."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """scaling * left @ right, of (E, R, rank) and (E, rank, C), for a tensor of E * R rows and C columns.

    With a DoRA magnitude, the sum is then divided by its norms, of its rows or its columns, and multiplied by it.
    """

    left: Factor
    right: Factor
    scaling: float
    magnitude: WeightSpec | None = None
    is_by_column: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What an adapter does to one tensor, in this order.

    replaced: the tensor that stands in its place. product: what is added. added: (vector, scaling) for a bias. rows:
    (rows, their indices) that replace rows of it.
    """

    adapter: AdapterFile
    replaced: WeightSpec | None = None
    product: Product | None = None
    added: tuple[WeightSpec, float] | None = None
    rows: tuple[WeightSpec, tuple[int, ...]] | None = None

    @property
    def state_bytes(self) -> int:
        """The most bytes that are held while the tensor is read, beside its ranges."""
        small = [spec.numel() for spec in ((self.added or self.rows or (None,))[0],) if spec is not None]
        # A factor is held as it is stored and as float32.
        return 4 * sum(small) + (2 * (self.product.left.size + self.product.right.size) if self.product else 0)


class Merging(Protocol):
    """A tensor into which something may be merged."""

    @property
    def merge(self) -> Merge | None: ...


class MergedView:
    """Another view's weights with an adapter merged into them; see `View`."""

    def __init__(self, view: View, merge: Merge, work: Work) -> None:
        self.spec = view.spec
        self._view = view
        self._merge = merge
        self._work = work
        self._files = merge.adapter.files
        self._columns = math.prod(self.spec.shape[1:])
        # Several threads read one view, and the first loads what all of them need. Norms load factors: hence an RLock.
        self._lock = threading.RLock()
        self._loaded: dict[str, np.ndarray] = {}

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        product = self._merge.product
        first, last = start, stop
        if product is not None and product.magnitude is not None and not product.is_by_column:
            first, last = start // self._columns * self._columns, -(-stop // self._columns) * self._columns
        values = self._sum(first, last, slot)
        if product is not None and product.magnitude is not None:
            self._scale(product, values, first)
        self._set_rows(values, first)
        return casts.cast(values[start - first : stop - first], "F32", self.spec.dtype.name)

    def _sum(self, start: int, stop: int, slot: int) -> np.ndarray:
        """Return the float32 sum of the base's weights, or what replaces them, and the product."""
        from loaders.quantization.kernels.low_rank import add_product, tiled

        merge = self._merge
        values = self._work.array(f"merged {slot}", stop - start, np.float32)
        if merge.replaced is not None:
            values[:] = self._stored(merge.replaced, start, stop)
        else:
            values[:] = casts.to_float32(self._view.read(start, stop, slot), self._view.spec.dtype.name)
        if (product := merge.product) is not None:
            left = self._once("left", lambda: self._factor(product.left).reshape(-1, product.left.shape[2]))
            right = self._once("right", lambda: tiled(self._factor(product.right)))
            rows, columns = product.left.shape[1], product.right.shape[2]
            add_product(left, right, rows, columns, np.float32(product.scaling), start, values)
        if merge.added is not None:
            spec, scaling = merge.added
            values += self._stored(spec, start, stop) * np.float32(scaling)
        return values

    def _scale(self, product: Product, values: np.ndarray, first: int) -> None:
        """Give whole rows, or all columns, the norms of DoRA's magnitude."""
        assert product.magnitude is not None
        spec = product.magnitude
        magnitude = self._once("magnitude", lambda: self._stored(spec, 0, spec.numel()))
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros gives NaN, which the gate then names
            if not product.is_by_column:
                rows = values.reshape(-1, self._columns)
                at = first // self._columns
                norms = np.sqrt(np.square(rows, dtype=np.float64).sum(1)).astype(np.float32)
                rows *= (magnitude[at : at + len(rows)] / norms)[:, None]
                return
            factors = self._once("norms", lambda: magnitude / self._column_norms())
        values *= factors[(first + np.arange(values.size)) % self._columns]

    def _column_norms(self) -> np.ndarray:
        """Return the norm of each column of the sum, by a pass over the whole tensor."""
        squares, step = np.zeros(self._columns), max(1, SPAN // self._columns) * self._columns
        for start in range(0, self.spec.numel, step):
            rows = self._sum(start, min(start + step, self.spec.numel), NORMS).reshape(-1, self._columns)
            squares += np.square(rows, dtype=np.float64).sum(0)
        return np.sqrt(squares).astype(np.float32)

    def _set_rows(self, values: np.ndarray, first: int) -> None:
        if self._merge.rows is None:
            return
        spec, indices = self._merge.rows
        given = self._once("rows", lambda: self._stored(spec, 0, spec.numel())).reshape(-1, self._columns)
        for row, index in zip(given, indices, strict=True):
            low, high = index * self._columns - first, (index + 1) * self._columns - first
            if low < values.size and high > 0:
                values[max(low, 0) : high] = row[max(-low, 0) : values.size - low]

    # --- what the adapter stores

    def _once(self, name: str, load: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = load()
            return self._loaded[name]

    def _stored(self, spec: WeightSpec, start: int, stop: int) -> np.ndarray:
        """Read flat weights [start, stop) of a tensor of the adapter as float32."""
        item = spec.dtype.item_bytes
        raw = self._files.read(spec.file, spec.offset + start * item, spec.offset + stop * item)
        return casts.to_float32(np.frombuffer(raw, storage_of(spec.dtype)), spec.dtype.name)

    def _factor(self, factor: Factor) -> np.ndarray:
        """Load a stack of matrices, row-major."""
        length = 1 + sum((n - 1) * step for n, step in zip(factor.shape, factor.stride, strict=True))
        values = self._stored(factor.stored, factor.offset, factor.offset + length)
        strides = tuple(4 * step for step in factor.stride)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, factor.shape, strides, writeable=False))


def check_adapters(tensors: Iterable[Merging]) -> None:
    """Check that the adapters merged into some tensors are still the files that were planned for.

    Raises:
        BadCheckpoint: one has changed.
    """
    for file in {tensor.merge.adapter for tensor in tensors if tensor.merge is not None}:
        file.files.check_unchanged()
