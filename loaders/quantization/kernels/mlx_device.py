"""MLX's own quantizer as a backend: weights go to mlx's default device, codes come back.

The bytes of mlx on a CPU define the format here. Its Metal kernel rounds differently (see schemes/mlx_affine.py), so a
device is tried on a few groups first and refused if its bytes differ: the same job gives the same bytes everywhere.
All calls into mlx are made by one thread, since mlx's streams belong to the thread that made them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from loaders.errors import BadSpec
from loaders.missing import needed_for
from loaders.quantization.kernels import casts
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.quantization.kernels.mlx import affine

# The groups on which a device is tried. A third of them holds halves of steps, and a third only weights up to zero:
# those are the two cases in which Metal's kernel is known to differ, so that a few hundred groups are enough.
PROBE_GROUPS = 512


@runtime_checkable
class MlxCoder(Protocol):
    """Kernels that quantize by mlx itself."""

    def mlx_codes(
        self, x: np.ndarray, dtype: str, mode: str, bits: int, group: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Quantize whole groups of raw weights (n,) into packed codes (uint8), scales and, for "affine", biases.

        Scales and biases are raw, as they are stored; biases are None for the other modes.
        """
        ...


class MlxKernels(CpuKernels):
    """The encoders of MLX's formats on mlx's default device. The other encoders are the CPU's."""

    def __init__(self) -> None:
        with needed_for("backend=mlx"):
            import mlx.core as mx
        self._mx = mx
        if not _gives_the_same_bytes():
            raise BadSpec(
                f"backend=mlx: {mx.default_device()} rounds otherwise than MLX on a CPU, whose bytes are the format's;"
                " use backend=cpu, which gives them"
            )

    def mlx_codes(
        self, x: np.ndarray, dtype: str, mode: str, bits: int, group: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        return _thread().submit(codes, self._mx, x, dtype, mode, bits, group).result()


def codes(
    mx: Any, x: np.ndarray, dtype: str, mode: str, bits: int, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Quantize whole groups of raw weights (n,) of a float dtype by mx.quantize; see `MlxCoder.mlx_codes`."""
    taken = casts.to_float32(x, dtype) if dtype == "F64" else x
    weights = mx.array(taken.reshape(1, -1))
    weights = weights.view(mx.bfloat16) if dtype == "BF16" else weights
    made = mx.quantize(weights, group_size=group, bits=bits, mode=mode)
    mx.eval(*made)
    found = [_raw(mx, each) for each in made]
    return found[0].view(np.uint8), found[1], found[2] if len(found) > 2 else None


def _raw(mx: Any, array: Any) -> np.ndarray:
    """Return a flat numpy array of an mlx array's raw values; numpy has no bfloat16, which goes as its bits."""
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(bits).reshape(-1)


@cache
def _thread() -> ThreadPoolExecutor:
    """The one thread that calls mlx, made at its first use."""
    return ThreadPoolExecutor(1, thread_name_prefix="mlx")


@cache
def _gives_the_same_bytes() -> bool:
    """Whether the default device codes random groups, with halves and one-sided ranges among them, as the CPU does."""
    import mlx.core as mx

    group, bits = 64, 4
    values = np.random.default_rng(0).standard_normal((PROBE_GROUPS, group)).astype(np.float32)
    values[::3] = np.round(values[::3] * 4) / 8  # halves of steps
    values[1::3] = -np.abs(values[1::3])  # groups without a weight above zero
    flat = values.reshape(-1)
    packed = np.empty(flat.size * bits // 8, np.uint8)
    scales, biases = np.empty(PROBE_GROUPS, np.float32), np.empty(PROBE_GROUPS, np.float32)
    affine.encode(flat, bits, group, packed, scales, biases)
    made: Any = _thread().submit(codes, mx, flat, "F32", "affine", bits, group).result()
    ours = (packed, scales, biases)
    return all(bool((theirs == own).all()) for own, theirs in zip(ours, made, strict=True))
