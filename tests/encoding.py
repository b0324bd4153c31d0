"""Tensors in memory, and the parts that a scheme stores for them."""

from __future__ import annotations

import numpy as np

from loaders.backends.threads import ThreadedWork
from loaders.dtypes import DTYPES, storage_of
from loaders.quantization.measure import measure
from loaders.quantization.scheme import Block, Scheme
from loaders.specs import TensorSpec
from loaders.stats import ErrorSums
from loaders.tensors.logical_tensor import stored_name
from tests.making import Raw, weights

DTYPE_NAMES = ("BF16", "F16", "F32")


class MemoryView:
    """A `View` of an array."""

    def __init__(self, raw: Raw, name: str = "w.weight") -> None:
        self.spec = TensorSpec(name, DTYPES[raw.dtype], raw.data.shape)
        self._flat = raw.data.reshape(-1)

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        block = self._flat[start:stop].copy()
        block.flags.writeable = False
        return block


class MemorySink:
    """A `Sink` and `Stored` in memory. Bytes that nobody wrote are 0xEE, so that a gap shows."""

    def __init__(self, scheme: Scheme, spec: TensorSpec) -> None:
        self.stored = {}
        for role, part in scheme.stored(spec).items():
            data = np.full(part.size, 0xEE, np.uint8).view(storage_of(part.dtype))
            self.stored[role] = data if part.constant is None else np.frombuffer(part.constant, data.dtype)
        self.bound = {role for role, part in scheme.stored(spec).items() if part.is_bound}

    def write(self, role: str, start: int, data: Block) -> None:
        if role in self.bound:
            self.stored[role] = np.array(data)
            return
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        at = start * data.dtype.itemsize
        self.stored[role].view(np.uint8)[at : at + raw.size] = raw

    def read(self, role: str, start: int, stop: int) -> Block:
        return self.stored[role][start:stop].copy()

    def as_bytes(self) -> dict[str, bytes]:
        return {role: data.tobytes() for role, data in self.stored.items()}


def encode(scheme: Scheme, raw: Raw, work: ThreadedWork) -> tuple[MemorySink, ErrorSums]:
    view = MemoryView(raw)
    sink = MemorySink(scheme, view.spec)
    scheme.encode(view, sink, work)
    return sink, measure(view, scheme, view.spec, sink, work, lambda count: None)


def decode(scheme: Scheme, raw: Raw, sink: MemorySink, work: ThreadedWork) -> np.ndarray:
    spec = MemoryView(raw).spec
    out = np.empty(spec.numel, np.float32)
    scheme.decode(spec, sink, 0, spec.numel, out, work)
    return out.reshape(spec.shape)


def tensors_of(scheme: Scheme, sink: MemorySink, raw: Raw) -> dict[str, Raw]:
    """Return the stored parts as tensors of a file, for the reference decoders."""
    spec = MemoryView(raw).spec
    return {
        stored_name("w.weight", role): Raw(
            part.dtype.name, sink.stored[role].reshape(part.shape if not part.is_bound else -1)
        )
        for role, part in scheme.stored(spec).items()
    }


def random(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Raw:
    return weights(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.03, dtype)
