"""Rounding float32 to bfloat16, as torch does."""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.lanes import kernel


@kernel
def round_to_bf16(x, out):  # type: ignore[no-untyped-def]
    """Round float32 bits (uint32) to bfloat16 bits (uint16).

    Adding 0x7FFF, and 1 more where the last kept bit is odd, carries into the kept half exactly where nearest-even
    rounds up. The sum could turn a NaN into an infinity or carry into its sign, so every NaN becomes the quiet 0x7FC0.
    """
    for i in range(x.size):
        bits = np.uint32(x[i])
        rounded = np.uint32(bits + np.uint32(0x7FFF) + np.uint32((bits >> np.uint32(16)) & np.uint32(1)))
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded >> np.uint32(16))
