"""Weights on their way into memory: in place, cast, decoded, or through a scheme. The work behind `load_weights`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loaders.backends import kernels_of
from loaders.backends.threads import RANGE, THREAD_BYTES, ThreadedWork
from loaders.dtypes import WEIGHT_DTYPES, DType, storage_of
from loaders.loading.quantized_tensor import MemoryParts
from loaders.loading.resources import shared
from loaders.quantization.kernels import casts
from loaders.quantization.measure import measure
from loaders.quantization.scheme import Scheme, Sharing, View
from loaders.specs import StoredSpec, TensorSpec
from loaders.stats import ErrorSums
from loaders.strategies import Reader, WeightLoader
from loaders.tensors.logical_tensor import LogicalTensor, Window
from loaders.tensors.views import encoded_view, view_of

SMALL = 4 * RANGE  # bytes of source up to which a tensor stays on one thread


@dataclass(frozen=True, slots=True)
class Item:
    """What becomes of a tensor: a scheme's parts (after a cast), or plain weights of `dtype`.

    `names` are those of the parts, by role, where an engine looks for others than the usual.
    """

    tensor: LogicalTensor
    dtype: DType
    scheme: Scheme | None = None
    cast: DType | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_in_place(self) -> bool:
        """Whether the file's own bytes are the result."""
        tensor = self.tensor
        if self.scheme is not None or tensor.decode is not None or tensor.order is not None:
            return False
        stored = tensor.stored[0][1]
        is_whole = tensor.whole is None and tensor.shape == stored.shape and tensor.window == Window.whole(stored)
        return is_whole and self.dtype == tensor.dtype

    @property
    def spec(self) -> TensorSpec:
        """What a scheme is given, or what the plain weights are."""
        tensor = self.tensor
        return TensorSpec(tensor.name, self.cast or (tensor.dtype if self.scheme else self.dtype), tensor.shape)

    @property
    def stored(self) -> Mapping[str, StoredSpec]:
        """The parts that there will be."""
        if self.scheme is None:
            return {"weight": StoredSpec(self.dtype, self.tensor.shape)}
        return self.scheme.stored(self.spec)


@dataclass
class Made:
    """Parts by tensor and role, flat; the errors of those that a scheme made; what it took."""

    parts: dict[str, Mapping[str, np.ndarray]]
    errors: dict[str, ErrorSums]
    encode_s: float = 0.0
    measure_s: float = 0.0


def make(root: Path, items: Sequence[Item], strategy: WeightLoader, backend: str, *, measured: bool) -> Made:
    """Make what the items ask for, on the process's workers and within its budget.

    Results take the memory that `Item.stored` says; all else is a few MiB a thread.

    Raises:
        WeightmillError: a file cannot be read, or is damaged.
    """
    together, stop = shared(), threading.Event()
    specs = [spec for item in items for _, spec in item.tensor.stored]
    state = max((i.scheme.state_bytes(i.spec) for i in items if i.scheme is not None), default=0)
    with (
        together.budget.hold(together.workers * THREAD_BYTES + state),
        strategy.open(root, specs) as reader,
    ):
        work = ThreadedWork(kernels_of(backend), together.pool, stop)
        making = Making(reader, work, items, measured=measured)
        try:
            for item in (i for i in items if i.tensor.source_bytes > SMALL):
                making.tensor(item)
            work.each([i for i in items if i.tensor.source_bytes <= SMALL], making.tensor)
        except BaseException:
            stop.set()
            raise
    return making.made


class Making:
    """One pass over the items."""

    def __init__(self, reader: Reader, work: ThreadedWork, items: Sequence[Item], *, measured: bool) -> None:
        self._reader = reader
        self._work = work
        self._measured = measured
        self._groups: dict[str, list[Item]] = {}
        for item in (i for i in items if i.tensor.group is not None):
            self._groups.setdefault(str(item.tensor.group), []).append(item)
        self._shared: dict[str, Scheme] = {}
        self._sharing, self._counting = threading.Lock(), threading.Lock()
        self.made = Made({}, {})

    def tensor(self, item: Item) -> None:
        if item.scheme is None:
            view = view_of(item.tensor, self._reader, self._work, item.dtype)  # decoded weights are rounded once
            self.made.parts[item.tensor.name] = {"weight": self._plain(item, view)}
            return
        view = view_of(item.tensor, self._reader, self._work)
        sink, seen = MemoryParts(item.stored), encoded_view(view, item.cast)
        scheme = self._knowing(item, item.scheme)
        self._timed("encode_s", lambda: scheme.encode(seen, sink, self._work))
        if self._measured:
            again = view_of(item.tensor, self._reader, self._work)

            def look() -> None:
                self.made.errors[item.tensor.name] = measure(
                    again, scheme, seen.spec, sink, self._work, lambda count: None
                )

            self._timed("measure_s", look)
        self.made.parts[item.tensor.name] = sink.parts()

    def _timed(self, phase: str, body: Callable[[], Any]) -> None:
        began = time.perf_counter()
        body()
        with self._counting:
            setattr(self.made, phase, getattr(self.made, phase) + time.perf_counter() - began)

    def _plain(self, item: Item, view: View) -> np.ndarray:
        out = np.empty(item.spec.num_items, storage_of(item.dtype))
        is_cast = item.dtype != view.spec.dtype and view.spec.dtype.name in WEIGHT_DTYPES

        def copy(start: int, stop: int) -> None:
            block = view.read(start, stop)
            out[start:stop] = casts.cast(block, view.spec.dtype.name, item.dtype.name) if is_cast else block

        self._work.sweep(out.size, 1, copy)
        return out

    def _knowing(self, item: Item, scheme: Scheme) -> Scheme:
        """The scheme with what it shares over the tensor's fused group, found once a group."""
        if not isinstance(scheme, Sharing):
            return scheme
        key = item.tensor.group or item.tensor.name
        with self._sharing:
            if key not in self._shared:
                partners = self._groups[key] if item.tensor.group is not None else [item]
                views = [
                    encoded_view(view_of(p.tensor, self._reader, self._work), p.cast)
                    for p in partners
                    if p.scheme == scheme
                ]
                self._shared[key] = scheme.share(views, self._work)
            return self._shared[key]
