"""What a scheme stores for a tensor, in memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from loaders.dtypes import storage_of
from loaders.quantization.scheme import Block
from loaders.specs import StoredSpec


class MemoryParts:
    """The parts of one tensor in memory: a `Sink` that a scheme writes to, and a `Stored` to read them back."""

    def __init__(self, stored: Mapping[str, StoredSpec]) -> None:
        self._specs = stored
        self._parts: dict[str, np.ndarray] = {}
        self._lengths: dict[str, int] = {}
        for role, spec in stored.items():
            raw = np.empty(spec.size, np.uint8)
            if spec.constant is not None:
                raw[:] = np.frombuffer(spec.constant, np.uint8)
            self._parts[role] = raw.view(storage_of(spec.dtype))
            self._lengths[role] = self._parts[role].size

    def write(self, role: str, start: int, data: Block) -> None:
        flat = np.ascontiguousarray(data).reshape(-1)
        part = self._parts[role]
        part.view(np.uint8)[start * data.itemsize : start * data.itemsize + flat.nbytes] = flat.view(np.uint8)
        if self._specs[role].is_bound:
            self._lengths[role] = (start * data.itemsize + flat.nbytes) // part.itemsize

    def read(self, role: str, start: int, stop: int) -> Block:
        return self._parts[role][start : min(stop, self._lengths[role])]

    def parts(self) -> dict[str, np.ndarray]:
        """Return the parts by role, flat. A part whose length depends on weights has its actual length."""
        return {role: part[: self._lengths[role]] for role, part in self._parts.items()}
