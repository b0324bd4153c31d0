"""A checkpoint's weights by the names of a model's parameters: any range of any parameter, in the model's dtype.

A parameter is a run of logical tensors in flat order: mostly one tensor; for a fused parameter of experts gate, up,
gate, up... So the rows of a rank, or a few rows of an embedding, are ranges whatever the parameter consists of.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import numpy as np
import torch

from loaders.backends import kernels_of
from loaders.backends.threads import RANGE, THREAD_BYTES, Crew, ThreadedWork
from loaders.checkpoints.checkpoint import READS_FOLDERS, Checkpoint
from loaders.dtypes import WEIGHT_DTYPES, DType, dtype_named, storage_of
from loaders.errors import BadCheckpoint, StorageError
from loaders.loading.cache import WeightCache
from loaders.loading.resources import shared
from loaders.quantization.kernels import casts
from loaders.quantization.memory_parts import MemoryParts
from loaders.quantization.scheme import View
from loaders.specs import StoredSpec
from loaders.storage.hashes import text_digest
from loaders.strategies import loader
from loaders.strategies.lazy import MappedFiles
from loaders.tensors.encoding import Encoding, TensorEncoder
from loaders.tensors.logical_tensor import LogicalTensor, Window
from loaders.tensors.uses import Uses
from loaders.tensors.views import view_of

Parts = tuple[LogicalTensor, ...]
CACHE_FORMAT = 2  # part of every key: raised when the same encoding would give other parts, so that old entries miss


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype.

    Raises:
        BadCheckpoint: torch has no such dtype, as for ggml's blocks.
    """
    found = getattr(torch, dtype.torch, None)
    if not isinstance(found, torch.dtype):
        raise BadCheckpoint(f"{dtype}: torch has no such dtype; load it decoded")
    return found


class ModelWeights:
    """The open weights of a checkpoint, in any store. Files are open from their first use until `close`.

    Without `workers`, the threads are those that all loads of the process share; the shared memory budget applies in
    both cases. With `use_cache`, encoded tensors are kept in the cache on disk for the next load.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parameters: Mapping[str, Parts],
        *,
        workers: int | None = None,
        read: str = "lazy",
        use_cache: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.parameters = parameters
        self._exit = ExitStack()
        together = shared()
        self._budget = together.budget
        self._cache = together.cache if use_cache else None
        self._workers = workers or together.workers
        crew = together.crew if workers is None else self._exit.enter_context(Crew(workers))
        self._work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
        specs = {spec.name: spec for parts in parameters.values() for r in parts for _, spec in r.stored}
        is_local = checkpoint.source.store.is_local
        self._maps = MappedFiles(checkpoint.folder(READS_FOLDERS), private=True) if is_local else None
        made_by = loader(read if is_local else "remote")
        self._reader = self._exit.enter_context(made_by.open(checkpoint.source, list(specs.values())))
        self._uses: list[Uses] = []

    def __enter__(self) -> ModelWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, and end threads that are not shared."""
        self._exit.close()

    def expect(self, wanted: Mapping[str, Encoding | None]) -> None:
        """Say which parameters will be read whole, in this order, and what some will be encoded to; of stores that are
        not local, they are then fetched ahead.
        """
        copied = [tensor for name, each in wanted.items() if each is None for tensor in self.parameters[name]]
        encoded = {each.tensor.name: [each] for each in wanted.values() if each is not None}
        self._uses = [
            Uses(self._reader, copied, in_one_trip=True),
            Uses(self._reader, [each.tensor for [each] in encoded.values()], encoded),
        ]

    @contextmanager
    def _using(self, tensor: LogicalTensor) -> Iterator[None]:
        with ExitStack() as stack:
            for uses in self._uses:
                stack.enter_context(uses.of(tensor.name))
            yield

    def view(self, tensor: LogicalTensor) -> View:
        return view_of(tensor, self._reader, self._work)

    def fill(self, name: str, out: torch.Tensor, start: int = 0) -> None:
        """Fill a contiguous tensor with a parameter's flat elements from `start` on, in the tensor's dtype.

        Raises:
            BadCheckpoint: a tensor is damaged, or is not cast to the dtype.
            StorageError: a file cannot be read.
        """
        if out.numel() == 0:
            return
        flat, at = out.detach().view(-1), 0
        for tensor in self.parameters[name]:
            first, last = max(start - at, 0), min(start + out.numel() - at, tensor.spec.numel)
            if first < last:
                self._copy(tensor, first, last, flat[at + first - start : at + last - start])
            at += tensor.spec.numel

    def _copy(self, tensor: LogicalTensor, first: int, last: int, into: torch.Tensor) -> None:
        """Copy a tensor's elements [first, last)."""
        view, is_here = self.view(tensor), into.device.type == "cpu"
        # For a device they are read into the CPU's memory in pieces, so that no tensor is there as a whole.
        step = last - first if is_here else RANGE
        busy = min(self._workers, -(-min(step, last - first) // RANGE))
        is_whole = (first, last) == (0, tensor.spec.numel)
        with self._budget.hold(busy * THREAD_BYTES), self._using(tensor) if is_whole else nullcontext():
            for at in range(first, last, step):
                part = into[at - first : at - first + step]
                piece = part if is_here else torch.empty(part.shape, dtype=part.dtype)
                self._read(tensor, view, at, piece)
                if not is_here:
                    part.copy_(piece)

    def _read(self, tensor: LogicalTensor, view: View, first: int, out: torch.Tensor) -> None:
        """Fill a tensor of the CPU with a view's elements from `first` on."""
        wanted = dtype_named(str(out.dtype))
        array = out.view(torch.uint8).numpy().view(storage_of(wanted))

        def copy(begin: int, end: int) -> None:
            block = view.read(first + begin, first + end)
            array[begin:end] = block if wanted == tensor.dtype else _cast(block, tensor, wanted)

        self._work.sweep(out.numel(), 1, copy)

    def mapped(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """Return a parameter as a private map of its file, if the file holds it in the wanted form; else None.

        A write to the tensor copies the page and never reaches the file.
        """
        [tensor, *others] = self.parameters[name]
        if (
            self._maps is None
            or others
            or tensor.decode is not None
            or tensor.order is not None
            or dtype_named(str(dtype)) != tensor.dtype
        ):
            return None
        [(_, spec)] = tensor.stored
        if spec.shape != tensor.shape or spec.stride is not None or tensor.window != Window.whole(spec):
            return None
        try:
            raw = self._maps.mapped(spec)
        # Private maps count towards RLIMIT_DATA, so the system may refuse one. The caller then reads the weights, which
        # also reports any error of the file itself.
        except StorageError:
            return None
        if not raw.size or raw.ctypes.data % spec.dtype.item_bytes:
            return None
        return torch.from_numpy(raw).view(dtype).reshape(spec.shape)

    def encoded(self, encoding: Encoding) -> dict[str, torch.Tensor]:
        """Encode a tensor; returns the stored parts by role. The source tensor is never in memory as a whole."""
        stored = encoding.stored
        return {
            role: _tensor(part if stored[role].is_bound else part.reshape(stored[role].shape), stored[role].dtype)
            for role, part in self._parts(encoding, stored).items()
        }

    def keep_encoded(self, encodings: Sequence[Encoding]) -> int:
        """Encode tensors into the cache, but for those that it has; memory holds one encoded tensor at a time.

        Returns:
            How many were encoded.
        """
        assert self._cache is not None
        there = {*self._cache.keys()}
        left = [each for each in encodings if self._key(self._cache, each) not in there]
        self.expect({each.tensor.name: each for each in left})
        for each in left:
            self._parts(each, each.stored)
        self._uses = []
        return len(left)

    def _key(self, cache: WeightCache, encoding: Encoding) -> str:
        source, files = self.checkpoint.source, sorted({spec.file for _, spec in encoding.tensor.stored})
        content = [cache.content_of(source, file) for file in files]
        return text_digest(f"{CACHE_FORMAT} {content} {encoding!r}")

    def _parts(self, encoding: Encoding, stored: Mapping[str, StoredSpec]) -> dict[str, np.ndarray]:
        cache, source = self._cache, self.checkpoint.source
        if cache is None:
            return self._made(encoding, stored)
        key = self._key(cache, encoding)
        with cache.making(key):
            entry = cache.get(key)
            if entry is not None and set(entry.parts) == set(stored):
                return {role: part.view(storage_of(stored[role].dtype)) for role, part in entry.parts.items()}
            made = self._made(encoding, stored)
            cache.put(key, made, {"source": str(source.address), "tensor": encoding.tensor.name})
        return made

    def _made(self, encoding: Encoding, stored: Mapping[str, StoredSpec]) -> dict[str, np.ndarray]:
        parts = MemoryParts(stored)
        with (
            self._budget.hold(self._workers * THREAD_BYTES + encoding.state_bytes),
            self._using(encoding.tensor),
        ):
            TensorEncoder(self._reader, self._work, [encoding]).encode_only(encoding, parts)
        return parts.parts()

    def stored(self, tensor: LogicalTensor) -> dict[str, torch.Tensor]:
        """Return the stored parts of a quantized tensor, by role, unchanged."""
        made = {}
        with self._using(tensor):
            for role, spec in tensor.stored:
                data = np.empty(spec.size, np.uint8)
                for at in range(0, spec.size, RANGE):
                    end = min(at + RANGE, spec.size)
                    data[at:end] = self._reader.read(spec, at, end)
                made[role] = _tensor(data.view(storage_of(spec.dtype)).reshape(spec.shape), spec.dtype)
        return made


def _cast(block: np.ndarray, tensor: LogicalTensor, wanted: DType) -> np.ndarray:
    if tensor.dtype.name not in WEIGHT_DTYPES or wanted.name not in WEIGHT_DTYPES:
        raise BadCheckpoint(f"{tensor.name}: expected {wanted}, found {tensor.dtype}, which is not cast to it")
    return casts.cast(block, tensor.dtype.name, wanted.name)


def _tensor(data: np.ndarray, dtype: DType) -> Any:
    raw = np.ascontiguousarray(data)
    shape = raw.shape
    return torch.from_numpy(raw.reshape(-1).view(np.uint8)).view(torch_dtype(dtype)).reshape(shape)
