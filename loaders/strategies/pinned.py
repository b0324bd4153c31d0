"""`pinned`: files are mapped, and copied to a GPU through pinned memory, by several threads.

Each byte is copied twice, but by all the threads and by the GPU's copy engine at once; a plain copy from a map is made
by one thread, which waits for the GPU in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loaders.backends.arrays import gathered, shaped
from loaders.backends.machine import usable_cpus
from loaders.backends.staging import Staging
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec
from loaders.specs import WeightSpec
from loaders.strategies.base import TensorBytes
from loaders.strategies.lazy import LazyLoader

MOST_THREADS = 8  # a few CPUs copy as fast as the link to a GPU takes it


class PinnedLoader(LazyLoader):
    """The strategy `pinned`, for CUDA devices. `auto` does not choose it: it has not been measured on a GPU yet."""

    name = "pinned"
    not_for_jobs = "it is for loading onto a GPU; strategy=lazy maps the files for a job"

    def _tensors(self, checkpoint: Checkpoint, specs: Sequence[WeightSpec], device: str | None) -> Any:
        if device is None:
            return super()._tensors(checkpoint, specs, device)
        if device.partition(":")[0] not in ("cuda", "cpu"):
            raise BadSpec(f"strategy=pinned: device={device} has no pinned memory; strategy=unified_memory loads to it")
        return self._staged(checkpoint, specs, device)

    def _staged(self, checkpoint: Checkpoint, specs: Sequence[WeightSpec], device: str) -> Iterator[Any]:
        with (
            self.open(checkpoint.source, specs) as reader,
            Staging(device, min(MOST_THREADS, usable_cpus())) as staging,
        ):
            arrays = reader.stream([TensorBytes.whole(spec) for spec in specs])
            for spec in specs:
                yield shaped(staging.copied(gathered(next(arrays), spec)), spec)
