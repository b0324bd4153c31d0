"""Casts between float dtypes, rounding to nearest even as torch does. bfloat16 travels as its bits (uint16)."""

from __future__ import annotations

import numpy as np


def to_float32(block: np.ndarray, dtype: str) -> np.ndarray:
    """Return the float32 values of raw weights of a float dtype ("BF16", "F16", "F32", "F64")."""
    if dtype == "BF16":
        return (block.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return block.astype(np.float32, copy=False)


def cast(block: np.ndarray, source: str, target: str) -> np.ndarray:
    """Cast raw weights from one float dtype to another. Values beyond a narrower range become infinite."""
    if source == target:
        return block
    # numpy warns of overflow and NaN; the gate counts both later and fails the tensor by name.
    with np.errstate(over="ignore", invalid="ignore"):
        if target == "F64" and source != "BF16":
            return block.astype(np.float64)
        if target == "F16" and source != "BF16":
            return block.astype(np.float16)
        values = to_float32(block, source)
        if target == "BF16":
            from loaders.quantization.kernels.bfloat16 import round_to_bf16  # the only cast that needs numba

            out = np.empty(values.size, np.uint16)
            round_to_bf16(values.view(np.uint32), out)
            return out
        return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[target], copy=False)
