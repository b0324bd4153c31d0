"""Decoders of eight bits a weight: float8 E4M3 with a scale for each block of a matrix, int8 with one for each row.

E4M3 (OCP 8-bit Floating Point specification, 2023) has a sign, four exponent bits of bias 7 and three of mantissa;
there are no infinities, and 0x7F and 0xFF are NaN. All arithmetic is float32, rounded once an operation.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.lanes import kernel


def _e4m3_values() -> np.ndarray:
    """Return the values of E4M3 by code: float32 (256,)."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7) / 8
    values = np.where(exponent == 0, np.ldexp(mantissa, -6), np.ldexp(1 + mantissa, exponent - 7))
    values[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)


E4M3 = _e4m3_values()  # by code


@kernel
def decode_e4m3(codes, scales, scale_rows, first_column, block, out):  # type: ignore[no-untyped-def]
    """Multiply rows of E4M3 codes by the scales of their blocks of `block` columns.

    codes: uint8 (n, c), the matrix's columns from `first_column` on; scales: float32 (s, blocks); scale_rows: int64
    (n,), each row's row of scales; out: float32 (n, c), of any strides.
    """
    width = codes.shape[1]
    for i in range(codes.shape[0]):
        at = 0
        while at < width:
            end = min(width, ((first_column + at) // block + 1) * block - first_column)
            scale = scales[scale_rows[i], (first_column + at) // block]
            for j in range(at, end):
                out[i, j] = E4M3[codes[i, j]] * scale
            at = end


@kernel
def decode_int8(codes, scales, out):  # type: ignore[no-untyped-def]
    """Return (code * scale) * fl(1/127), a scale a row. codes: int8 (n, c); scales: float32 (n,); out: float32 (n, c).

    This is the order of bitsandbytes' int8_vectorwise_dequant.
    """
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j] = (np.float32(codes[i, j]) * scales[i]) * np.float32(1 / 127)
