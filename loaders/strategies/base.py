"""What every strategy offers: open some tensors, then read byte ranges of them, from any thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from loaders.errors import BadCheckpoint
from loaders.specs import WeightSpec


class Reader(Protocol):
    """Open tensors."""

    def read(self, spec: WeightSpec, start: int, stop: int, slot: int = 0) -> np.ndarray:
        """Bytes [start, stop) of a stored tensor, uint8. Valid until this thread reads into the same slot again.

        Raises:
            BadCheckpoint: the file is shorter than it was when it was planned for.
            StorageError: the file cannot be read.
        """
        ...

    def mapped(self, spec: WeightSpec) -> np.ndarray:
        """All bytes of a stored tensor as a map, for tensors that are not contiguous."""
        ...


class WeightLoader(ABC):
    """A way of reading."""

    name: ClassVar[str]

    @abstractmethod
    def open(self, root: Path, specs: Sequence[WeightSpec]) -> AbstractContextManager[Reader]:
        """Open the files of `specs`, which will be read about in this order."""


def cut_short(spec: WeightSpec, size: int) -> BadCheckpoint:
    """The error of a file that ends before a tensor does."""
    return BadCheckpoint(
        f"{spec.file}: {spec.name!r} ends at byte {spec.offset + spec.size}, the file now has {size};"
        " it changed while it was read"
    )
