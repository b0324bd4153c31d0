"""What a scheme stores for one tensor, in memory."""

from __future__ import annotations

import numpy as np

from loaders.quantization.scheme import Scheme
from loaders.specs import DType, TensorSpec, storage_of


class MemorySink:
    """See `Sink` and `Stored`."""

    def __init__(self, scheme: Scheme, spec: TensorSpec) -> None:
        self._specs = dict(scheme.stored(spec))
        self._data = {}
        for role, part in self._specs.items():
            storage = storage_of(part.dtype)
            flat = np.empty(part.size // storage.itemsize, storage)
            if part.constant is not None:
                flat[:] = np.frombuffer(part.constant, storage)
            self._data[role] = flat

    def write(self, role: str, start: int, data: np.ndarray) -> None:
        flat = self._data[role]
        raw = data.reshape(-1).view(flat.dtype)
        flat[start : start + raw.size] = raw
        if self._specs[role].is_bound:
            self._data[role] = flat[: start + raw.size]

    def read(self, role: str, start: int, stop: int) -> np.ndarray:
        return self._data[role][start:stop]

    def stored(self) -> dict[str, tuple[np.ndarray, DType]]:
        """By role, in the shape and dtype in which it is stored."""
        return {
            role: (flat if part.is_bound else flat.reshape(part.shape), part.dtype)
            for (role, part), flat in zip(self._specs.items(), self._data.values(), strict=True)
        }
