"""`low_memory`: of several processes, only the first loads a model, to the CPU.

The others get tensors without memory (torch's meta device), to be filled by broadcasting or sharding. A machine then
holds a model once, however many processes it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from loaders.backends.arrays import storage_shape
from loaders.backends.devices import torch_device
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec
from loaders.specs import WeightSpec
from loaders.storage.base import PinnedFiles
from loaders.strategies.auto import AutoLoader
from loaders.strategies.base import PieceReader, WeightLoader


class LowMemoryLoader(WeightLoader):
    """The strategy `low_memory`.

    `rank` is this process's number; None takes that of `rank_here`.
    """

    name = "low_memory"
    not_for_jobs = "it is for loading one model into several processes; strategy=lazy or read reads for a job"

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank
        self._by = AutoLoader()

    @property
    def fetches(self) -> bool:
        return self._rank() == 0

    @contextmanager
    def open(self, files: PinnedFiles, specs: Sequence[WeightSpec]) -> Iterator[PieceReader]:
        if self._rank() != 0:
            raise BadSpec(f"strategy=low_memory: rank {self._rank()} holds no weights to read; only rank 0 does")
        with self._by.open(files, specs) as reader:
            yield reader

    def _tensors(self, checkpoint: Checkpoint, specs: Sequence[WeightSpec], device: str | None) -> Any:
        if device not in (None, "cpu"):
            raise BadSpec(f"strategy=low_memory: it loads to the CPU of rank 0, not to device={device}")
        return self._by._tensors(checkpoint, specs, "cpu") if self._rank() == 0 else _empty(specs)

    def _rank(self) -> int:
        return rank_here() if self.rank is None else self.rank


def rank_here() -> int:
    """Return this process's rank: torch.distributed's if it is initialized, else RANK from the environment, else 0."""
    distributed = sys.modules.get("torch.distributed")  # if nobody imported it, nobody initialized it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", "0"))


def _empty(specs: Sequence[WeightSpec]) -> Iterator[Any]:
    """Yield tensors on the meta device, with the shapes and dtypes that rank 0 gets."""
    torch, device = torch_device("meta")
    for spec in specs:
        kind = getattr(torch, spec.dtype.torch, None)
        as_bytes = spec.dtype.block > 1 or spec.dtype.bits < 8 or kind is None
        shape = storage_shape(spec.dtype, spec.shape) if as_bytes else spec.shape
        yield torch.empty(shape, dtype=torch.uint8 if as_bytes else kind, device=device)
