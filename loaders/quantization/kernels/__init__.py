"""The arithmetic of the schemes. `Kernels` is what a backend provides: the encoders whose cost decides a job's speed.

Decoding and comparing always run on the CPU, by code that no encoder shares, so that a device never checks itself.

Importing numba takes as long as planning a small job, which runs no kernel. So schemes and views import kernels inside
the functions that run them, and `casts` and the tables of numbers that plans need import no numba.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Kernels(Protocol):
    """Encoders over flat raw weights of a float dtype ("BF16" as uint16, "F16", "F32"). Outputs are filled in place."""

    def encode_fourbit(
        self, x: np.ndarray, dtype: str, table: str, group: int, packed: np.ndarray, absmax: np.ndarray
    ) -> None:
        """Code full groups by a table ("nf4" or "fp4") and each group's largest magnitude.

        packed: uint8 (n/2,), the first code of a byte in its high half; absmax: float32 (n/group,).
        """
        ...

    def group_absmax(self, x: np.ndarray, dtype: str, group: int, absmax: np.ndarray) -> None:
        """Find the largest magnitude of each full group, as `encode_fourbit` does, without coding."""
        ...

    def magnitude_sums(self, x: np.ndarray, dtype: str) -> np.ndarray:
        """Return the sums of |x| in float64 over bitnet.SUMMED weights each, NaN or infinite where a weight is.

        The last bit is the same on every device: see `bitnet.magnitude_sums` for the order of additions.
        """
        ...

    def pack_ternary(
        self, runs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], dtype: str, inverse: float, out: np.ndarray
    ) -> None:
        """Pack clamp(round(x * inverse), -1, 1) + 1 of four runs (n,) into out, uint8 (n,).

        Each run takes two bits of a byte, the first the lowest.
        """
        ...
