"""`unified_memory`: files are mapped, for devices that work in the CPU's own memory.

On the CPU tensors lie in the map. MLX and MPS want arrays of their own: each byte is copied once, from the map to where
the GPU reads it, and there is no other copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loaders.checkpoints.checkpoint import Checkpoint
from loaders.errors import BadSpec
from loaders.specs import WeightSpec
from loaders.strategies.lazy import LazyLoader

SHARED = ("cpu", "mps", "mlx")


class UnifiedMemoryLoader(LazyLoader):
    """The strategy `unified_memory`: maps for the CPU, MPS and MLX. It refuses a GPU with memory of its own."""

    name = "unified_memory"
    not_for_jobs = "it is for loading onto a device; strategy=lazy maps the files for a job"

    def _tensors(self, checkpoint: Checkpoint, specs: Sequence[WeightSpec], device: str | None) -> Any:
        if device is not None and device.partition(":")[0] not in SHARED:
            raise BadSpec(
                f"strategy=unified_memory: device={device} has memory of its own; known: {', '.join(SHARED)};"
                " strategy=multithread loads to it"
            )
        return super()._tensors(checkpoint, specs, device)
