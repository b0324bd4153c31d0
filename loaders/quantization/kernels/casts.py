"""Casts between float dtypes, rounding to nearest even as torch does. bfloat16 travels as its bits (uint16)."""

from __future__ import annotations

import numpy as np

from loaders.dtypes import DTYPES, storage_of

FEW = 1 << 16  # weights that numpy casts to float16 or float32 sooner than numba is imported


def to_float32(block: np.ndarray, dtype: str) -> np.ndarray:
    """Return the float32 values of raw weights of a float dtype ("BF16", "F16", "F32", "F64")."""
    if dtype == "BF16":
        return (block.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return block.astype(np.float32, copy=False)


def cast(block: np.ndarray, source: str, target: str, out: np.ndarray | None = None) -> np.ndarray:
    """Cast raw weights from one float dtype to another. Values beyond a narrower range become infinite.

    `out` is contiguous memory that may take the result.
    """
    if source == target:
        return block
    if "F64" in (source, target) or (target != "BF16" and block.size < FEW):
        return _by_numpy(block, source, target)
    from loaders.quantization.kernels.float_casts import CASTS

    out = np.empty(block.shape, storage_of(DTYPES[target])) if out is None else out
    given = np.require(block.reshape(-1), requirements=["C", "ALIGNED"])
    x, made = (each.view(np.int16 if each.dtype == np.float16 else each.dtype) for each in (given, out.reshape(-1)))
    x.flags.writeable = False  # as most blocks are: numba compiles a kernel for each mixture
    CASTS[target](x, made)
    return out


def _by_numpy(block: np.ndarray, source: str, target: str) -> np.ndarray:
    # numpy warns of overflow and NaN; the gate counts both later and fails the tensor by name.
    with np.errstate(over="ignore", invalid="ignore"):
        if target == "BF16":
            return cast(to_float32(block, source), "F32", "BF16")
        values = to_float32(block, source) if source == "BF16" else block
        return values.astype(storage_of(DTYPES[target]))
