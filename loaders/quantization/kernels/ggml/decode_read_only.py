"""Decoders of ggml's block formats that are only read, as dequantize_row_* (ggml/src/ggml-quants.c) compute them.

By block: NVFP4, of 64 weights: four unsigned E4M3 scales, each for 16 weights, then 8 bytes of two codes for each 16,
whose first eight are low; what the scales of a tensor share is a tensor of its own. Q1_0, of 128 weights: a float16
scale, one bit a weight, for -1 and 1. Q2_0, of 64 weights: a float16 scale, two bits a weight, for -1, 0, 1 and 2.
data: uint8, whole blocks; out: float32, their weights.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.ggml.fields import half_at
from loaders.quantization.kernels.lanes import kernel


def _halved_ue4m3() -> np.ndarray:
    """Return half of what each byte means as ggml's unsigned E4M3, which ignores the sign and takes 0x7f for 0."""
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, (codes & 7).astype(np.float64)
    values = np.where(exponents == 0, fractions * 2.0**-9, (1 + fractions / 8) * 2.0 ** (exponents - 7.0))
    values[0x7F] = 0
    return (values / 2).astype(np.float32)


HALVED_UE4M3 = _halved_ue4m3()
DOUBLED_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


@kernel
def nvfp4(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 64):
        for s in range(4):
            scale = HALVED_UE4M3[data[b * 36 + s]]
            at, to = b * 36 + 4 + 8 * s, b * 64 + 16 * s
            for j in range(8):
                byte = data[at + j]
                out[to + j] = DOUBLED_E2M1[byte & 15] * scale
                out[to + 8 + j] = DOUBLED_E2M1[byte >> 4] * scale


@kernel
def q1_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 128):
        scale = half_at(data, b * 18)
        for j in range(128):
            bit = (data[b * 18 + 2 + (j >> 3)] >> np.uint8(j & 7)) & np.uint8(1)
            out[b * 128 + j] = scale if bit else -scale


@kernel
def q2_0(data, out):  # type: ignore[no-untyped-def]
    for b in range(out.size // 64):
        scale = half_at(data, b * 18)
        for j in range(64):
            code = (data[b * 18 + 2 + (j >> 2)] >> np.uint8(2 * (j & 3))) & np.uint8(3)
            out[b * 64 + j] = np.float32(np.int32(code) - 1) * scale


READ_DECODERS = {"NVFP4": nvfp4, "Q1_0": q1_0, "Q2_0": q2_0}
