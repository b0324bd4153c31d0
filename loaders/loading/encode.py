"""The work behind `load_weights`: making cast, decoded and quantized tensors in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from loaders.backends import kernels_of
from loaders.backends.threads import THREAD_BYTES, ThreadedWork
from loaders.clock import Clock
from loaders.dtypes import WEIGHT_DTYPES, DType, storage_of
from loaders.loading.resources import shared
from loaders.quantization.kernels import casts
from loaders.quantization.memory_parts import MemoryParts
from loaders.quantization.scheme import View
from loaders.specs import StoredSpec, TensorSpec
from loaders.stats import ErrorSums
from loaders.storage.base import PinnedFiles
from loaders.strategies import Reader, WeightLoader
from loaders.tensors.encoding import Encoding, TensorEncoder
from loaders.tensors.logical_tensor import LogicalTensor, Window
from loaders.tensors.uses import Uses
from loaders.tensors.views import view_of


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedTensor:
    """A tensor to be made in memory: the parts of an encoding, or plain weights of `dtype` if there is no encoding.

    `names` are the engine's names of the parts, by role, where they differ from the usual ones.
    """

    tensor: LogicalTensor
    dtype: DType
    encoding: Encoding | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_in_place(self) -> bool:
        """Whether the result is the bytes of the file, unchanged."""
        tensor = self.tensor
        if self.encoding is not None or tensor.decode is not None or tensor.order is not None:
            return False
        stored = tensor.stored[0][1]
        is_whole = tensor.whole is None and tensor.shape == stored.shape and tensor.window == Window.whole(stored)
        return is_whole and self.dtype == tensor.dtype

    @property
    def spec(self) -> TensorSpec:
        """The spec of the tensor that the scheme gets, or of the plain weights."""
        plain = TensorSpec(self.tensor.name, self.dtype, self.tensor.shape)
        return plain if self.encoding is None else self.encoding.spec

    @property
    def stored(self) -> Mapping[str, StoredSpec]:
        """The parts that will be made, by role."""
        if self.encoding is None:
            return {"weight": StoredSpec(self.dtype, self.tensor.shape)}
        return self.encoding.stored


@dataclass
class MadeTensors:
    """The results: parts by tensor and role, flat; errors of the quantized tensors; thread seconds by phase."""

    parts: dict[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    errors: dict[str, ErrorSums] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=lambda: Clock().seconds())


def make(
    source: PinnedFiles,
    wanted: Sequence[WantedTensor],
    strategy: WeightLoader,
    backend: str,
    *,
    measured: bool,
    on_done: Callable[[WantedTensor], None] = lambda wanted: None,
) -> MadeTensors:
    """Make the wanted tensors with the threads that the process's loads share, within their memory budget.

    `on_done` hears of each tensor that was made, from the thread that made it.

    Results take the memory that `WantedTensor.stored` states; everything else is a few MiB per thread.

    Raises:
        WeightmillError: a file cannot be read, or is damaged.
    """
    together, stop = shared(), threading.Event()
    specs = [spec for each in wanted for _, spec in each.tensor.stored]
    state = max((each.encoding.state_bytes for each in wanted if each.encoding is not None), default=0)
    with (
        together.budget.hold(together.workers * THREAD_BYTES + state),
        strategy.open(source, specs) as reader,
    ):
        work = ThreadedWork(kernels_of(backend), together.crew, stop)
        making = Making(reader, work, wanted, stop, measured=measured)

        def one(each: WantedTensor) -> None:
            making.tensor(each)
            on_done(each)

        try:
            work.each(wanted, one)
        # Interrupts too: threads that still work must stop before the files are closed.
        except BaseException:
            stop.set()
            raise
    return making.finished()


class Making:
    """One pass over the wanted tensors."""

    def __init__(
        self,
        reader: Reader,
        work: ThreadedWork,
        wanted: Sequence[WantedTensor],
        stop: threading.Event,
        *,
        measured: bool,
    ) -> None:
        self._reader = reader
        self._work = work
        self._measured = measured
        self._clock = Clock()
        encodings = [each.encoding for each in wanted if each.encoding is not None]
        self._encoder = TensorEncoder(reader, work, encodings, self._clock)
        # Each wanted tensor is made by a step of its own, also where several are pieces of one of the checkpoint's.
        by_name = {each.tensor.name: [each.encoding] for each in wanted if each.encoding is not None}
        self._uses = Uses(reader, [each.tensor for each in wanted], by_name, stop)
        self._made = MadeTensors()

    def tensor(self, wanted: WantedTensor) -> None:
        with self._uses.of(wanted.tensor.name):
            self._make(wanted)

    def _make(self, wanted: WantedTensor) -> None:
        name, encoding = wanted.tensor.name, wanted.encoding
        if encoding is None:
            self._made.parts[name] = {"weight": self._plain(wanted)}
            return
        parts = MemoryParts(encoding.stored)
        if self._measured:
            self._made.errors[name] = self._encoder.encode(encoding, parts)
        else:
            self._encoder.encode_only(encoding, parts)
        self._made.parts[name] = parts.parts()

    def _plain(self, wanted: WantedTensor) -> np.ndarray:
        """Return weights of the wanted dtype. Decoded weights are rounded once, straight to that dtype."""
        view: View = view_of(wanted.tensor, self._reader, self._work, wanted.dtype, clock=self._clock)
        out = np.empty(wanted.spec.num_items, storage_of(wanted.dtype))
        is_cast = wanted.dtype != view.spec.dtype and view.spec.dtype.name in WEIGHT_DTYPES

        def copy(start: int, stop: int) -> None:
            block = view.read(start, stop)
            out[start:stop] = casts.cast(block, view.spec.dtype.name, wanted.dtype.name) if is_cast else block

        self._work.sweep(out.size, 1, copy)
        return out

    def finished(self) -> MadeTensors:
        """Return everything that was made, with the seconds it took."""
        self._made.seconds = self._clock.seconds()
        return self._made
