"""The arithmetic of the schemes. `Kernels` is what a backend provides: the encoders, whose cost decides a job's speed.

Decoding and comparing always run on the CPU, by code that no encoder shares: what a device wrote is checked elsewhere.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Kernels(Protocol):
    """Encoders over flat raw weights of a float dtype ("BF16" as uint16, "F16", "F32"). Outputs are filled in place."""

    def encode_fourbit(
        self, x: np.ndarray, dtype: str, table: str, group: int, packed: np.ndarray, absmax: np.ndarray
    ) -> None:
        """Codes of full groups: uint8 (n/2,), first code high, and float32 (n/group,) largest magnitudes."""
        ...

    def group_absmax(self, x: np.ndarray, dtype: str, group: int, absmax: np.ndarray) -> None:
        """The largest magnitudes alone."""
        ...

    def magnitude_sum(self, x: np.ndarray, dtype: str) -> float:
        """Sum of |x| in float64, NaN or infinite if a weight is."""
        ...

    def pack_ternary(
        self, runs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], dtype: str, inverse: float, out: np.ndarray
    ) -> None:
        """clamp(round(x * inverse)) + 1 of four runs (n,), two bits each, the first lowest: uint8 (n,)."""
        ...
