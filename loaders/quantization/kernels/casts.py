"""Casts between float dtypes, rounding to nearest even as torch does. bfloat16 travels as its bits (uint16)."""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.lanes import kernel


@kernel
def _round_to_bf16(x, out):  # type: ignore[no-untyped-def]
    """Round float32 bits (uint32) to bfloat16 bits (uint16).

    Adding 0x7FFF, and 1 more where the last kept bit is odd, carries into the kept half exactly where nearest-even
    rounds up. The sum could turn a NaN into an infinity or carry into its sign, so every NaN becomes the quiet 0x7FC0.
    """
    for i in range(x.size):
        bits = np.uint32(x[i])
        rounded = np.uint32(bits + np.uint32(0x7FFF) + np.uint32((bits >> np.uint32(16)) & np.uint32(1)))
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded >> np.uint32(16))


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
            out = np.empty(values.size, np.uint16)
            _round_to_bf16(values.view(np.uint32), out)
            return out
        return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[target], copy=False)
