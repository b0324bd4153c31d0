"""`pinned`: files are read into pinned memory by several threads, and from there copied by a GPU's own engine.

A plain copy from a map is made by one thread, which waits for the GPU in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from loaders.backends.arrays import gathered, shaped
from loaders.backends.machine import usable_cpus
from loaders.backends.staging import Filling, Staging
from loaders.checkpoints.checkpoint import Checkpoint
from loaders.dtypes import is_contiguous
from loaders.errors import BadSpec
from loaders.specs import WeightSpec
from loaders.strategies.base import local_root
from loaders.strategies.lazy import LazyLoader
from loaders.strategies.reading.open_files import OpenFiles

MOST_THREADS = 8  # a few CPUs copy as fast as the link to a GPU takes it


class PinnedLoader(LazyLoader):
    """The strategy `pinned`, for CUDA devices."""

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
            closing(OpenFiles(local_root(checkpoint.source, self.name))) as files,
            Staging(device, min(MOST_THREADS, usable_cpus())) as staging,
        ):
            copied = staging.copied(_filling(files, spec) for spec in specs)
            for spec, raw in zip(specs, copied, strict=True):
                yield shaped(raw, spec)


def _filling(files: OpenFiles, spec: WeightSpec) -> Filling:
    """Return what fills arrays with a stored tensor's bytes, in row-major order."""
    if spec.stride is None or is_contiguous(spec.shape, spec.stride):
        return Filling(spec.size, lambda at, out: files.fill(spec, at, out))
    raw = gathered(files.mapped(spec), spec)
    return Filling(raw.size, lambda at, out: np.copyto(out, raw[at : at + out.size]))
