"""The decoder of float4 E2M1, two codes a byte, the first low, with a scale for each group of a row.

E2M1 (OCP Microscaling Formats specification 1.0) has a sign, two exponent bits and one of mantissa: 0, 0.5, 1, 1.5, 2,
3, 4, 6.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.lanes import kernel

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # by code


@kernel
def decode_fp4(packed, scales, first, group, out):  # type: ignore[no-untyped-def]
    """Decode columns [first, first + c) of rows, which may begin and end within a byte and within a group.

    packed: uint8 (n, C/2); scales: float32 (n, C/group); out: float32 (n, c).
    """
    for i in range(out.shape[0]):
        at = 0
        while at < out.shape[1]:
            column = first + at
            end = min(out.shape[1], (column // group + 1) * group - first)
            scale = scales[i, column // group]
            if column % 2:
                out[i, at] = E2M1[packed[i, column // 2] >> 4] * scale
                at += 1
            pairs = (end - at) // 2
            for p in range(pairs):
                byte = packed[i, (first + at) // 2 + p]
                out[i, at + 2 * p] = E2M1[byte & 15] * scale
                out[i, at + 2 * p + 1] = E2M1[byte >> 4] * scale
            if at + 2 * pairs < end:
                out[i, end - 1] = E2M1[packed[i, (first + end - 1) // 2] & 15] * scale
            at = end
