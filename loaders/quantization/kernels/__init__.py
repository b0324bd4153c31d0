"""The arithmetic of the schemes. `Kernels` is what a backend provides: the encoders whose cost decides a job's speed.

Decoding and comparing run by code that no encoder shares: on the CPU, or on the device that encoded, where weights and
codes lie already (`ComparingKernels`). Sums of their words then show that the device's are those in memory.

Importing numba takes as long as planning a small job, which runs no kernel. So schemes and views import kernels inside
the functions that run them, and `casts` and the tables of numbers that plans need import no numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np

from loaders.quantization.grid import Grid


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

    def encode_int8(self, x: np.ndarray, dtype: str, columns: int, codes: np.ndarray, absmax: np.ndarray) -> None:
        """Code rows as LLM.int8(). codes: int8 (n,); absmax: float32 (n/columns,), infinite where float16 ends."""
        ...

    def encode_packed(
        self, x: np.ndarray, dtype: str, group: int, bits: int, eps: np.float32, packed: np.ndarray, scales: np.ndarray
    ) -> None:
        """Code groups as compressed-tensors does, by four or eight bits, without zero points.

        packed: uint8 (n*bits/8,); scales: float32 (n/group,), rounded to the weights' dtype, `eps` instead of zero.
        """
        ...

    def encode_packed_zero(
        self, x: np.ndarray, dtype: str, group: int, eps: np.float32, packed: np.ndarray, scales: np.ndarray,
        zeros: np.ndarray,
    ) -> None:  # fmt: skip
        """Code groups by four bits with zero points, int8 (n/group,); the rest is as in `encode_packed`."""
        ...

    def encode_scaled_rows(
        self, x: np.ndarray, dtype: str, kind: str, columns: int, eps: np.float32, codes: np.ndarray, scales: np.ndarray
    ) -> None:
        """Code rows as compressed-tensors does, as E4M3 ("float") or int8 ("int").

        codes: the bits, uint8 (n,); scales: float32 (n/columns,), as in `encode_packed`.
        """
        ...

    def encode_affine(
        self, x: np.ndarray, dtype: str, bits: int, group: int, packed: np.ndarray, scales: np.ndarray,
        biases: np.ndarray,
    ) -> None:  # fmt: skip
        """Code groups as MLX does, affinely. packed: uint8 (n*bits/8,).

        scales, biases: float32 (n/group,), not yet rounded to the weights' dtype.
        """
        ...

    def encode_blocks(self, x: np.ndarray, dtype: str, kind: str, out: np.ndarray) -> None:
        """Encode blocks of a ggml type into uint8 (bytes,)."""
        ...

    def pack_ternary(
        self, runs: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], dtype: str, inverse: float, out: np.ndarray
    ) -> None:
        """Pack clamp(round(x * inverse), -1, 1) + 1 of four runs (n,) into out, uint8 (n,).

        Each run takes two bits of a byte, the first the lowest.
        """
        ...

    def solve_hqq(
        self, x: np.ndarray, dtype: str, strides: tuple[int, int], size: int, top: int, rounds: bool, tile: int,
        found: tuple[np.ndarray, np.ndarray, np.ndarray], errors: np.ndarray,
    ) -> None:  # fmt: skip
        """Find HQQ's scales and zeros of groups of `size` weights, where they are not known yet: see hqq/solver.py.

        strides: from group to group and from weight to weight, one of which is 1. found: scales and zeros, float32
        (groups,), and for each the number of updates after which it moved no more, uint8, solver.UNKNOWN before the
        first search. errors: float64 (tiles, updates), to which a first search adds each tile's sums of |error|.
        """
        ...


class Decoder(Protocol):
    """A decoder on a device. Equal ones do the same, so that what one did can be done again for another."""

    def __hash__(self) -> int: ...

    def __call__(self, parts: Sequence[Any]) -> Any:
        """Return float32 values, a torch tensor (n,), of parts, torch tensors of uint8."""
        ...


@runtime_checkable
class ComparingKernels(Kernels, Protocol):
    """Kernels of a device that also compares what it encoded, so that only codes and a few numbers come back."""

    def keeping(self) -> AbstractContextManager[None]:
        """Keep the weights and codes of this thread's calls on the device until the block ends."""
        ...

    def keeps(self, x: np.ndarray) -> bool:
        """Whether the device keeps these raw weights for this thread."""
        ...

    def compare(
        self,
        x: np.ndarray,
        dtype: str,
        parts: Sequence[np.ndarray],
        decoder: Decoder,
        grid: Grid | None,
        sums: np.ndarray,
    ) -> None:
        """Add the differences of kept raw weights and of what `decoder` makes of stored parts to `sums`.

        `sums` are those of kernels/compare.py; a weight that is not the nearest on the grid counts as wrong.

        Raises:
            VerifyFailed: the device's weights or codes are not those in memory.
        """
        ...
