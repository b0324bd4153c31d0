"""HQQ's decoder, in the compute dtype's arithmetic: (code - zero) * scale, rounded after each of the two steps.

Source: hqq 0.2.8, hqq/core/quantize.py, Quantizer.dequantize, as torch computes it on a CPU. No code is shared with the
encoder, which this checks.
"""

from __future__ import annotations

import numpy as np

from loaders.quantization.kernels.lanes import kernel


@kernel
def _bf16(values):  # type: ignore[no-untyped-def]
    """Round float32 values, given as their bits, to bfloat16 in place; a NaN stays a NaN."""
    for i in range(values.size):
        bits = values[i]
        rounded = np.uint32(bits + np.uint32(0x7FFF) + np.uint32((bits >> np.uint32(16)) & np.uint32(1)))
        is_number = (bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
        values[i] = np.uint32(rounded & np.uint32(0xFFFF0000)) if is_number else np.uint32(bits | np.uint32(0x400000))


@kernel
def _f16(values, floats):  # type: ignore[no-untyped-def]
    """Round float32 values to float16 in place; `values` are their bits, `floats` the same memory.

    Below 2^-14 float16 has steps of 2^-24, as float32 has from 0.5 to 1: adding 0.75 rounds to them.
    """
    for i in range(values.size):
        bits = values[i]
        magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
        small = np.float32(np.float32(abs(floats[i]) + np.float32(0.75)) - np.float32(0.75))
        odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
        rounded = np.uint32(np.uint32(magnitude + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000))
        normal = rounded if rounded <= np.uint32(0x477FE000) else np.uint32(0x7F800000)
        normal = normal if magnitude <= np.uint32(0x7F800000) else magnitude
        floats[i] = small
        chosen = values[i] if magnitude < np.uint32(0x38800000) else normal
        values[i] = np.uint32(chosen | np.uint32(bits & np.uint32(0x80000000)))


@kernel
def _offsets(codes, shift, mask, zeros, size, out):  # type: ignore[no-untyped-def]
    """Subtract zeros from codes, for groups of `size` values one after another."""
    for g in range(out.size // size):
        zero = zeros[g]
        for i in range(g * size, (g + 1) * size):
            out[i] = np.float32(np.int32((codes[i] >> shift) & mask)) - zero


@kernel
def _offsets_across(codes, shift, mask, zeros, out):  # type: ignore[no-untyped-def]
    """Subtract zeros from codes, for one value of each group."""
    for i in range(out.size):
        out[i] = np.float32(np.int32((codes[i] >> shift) & mask)) - zeros[i]


def _round(values: np.ndarray, dtype: str) -> None:
    """Round float32 values to a float dtype, nearest even, in place; they stay float32."""
    if dtype == "BF16":
        _bf16(values.view(np.uint32))
    elif dtype == "F16":
        _f16(values.view(np.uint32), values)


def decode_rows(
    codes: np.ndarray, shift: int, mask: int, scales: np.ndarray, zeros: np.ndarray, dtype: str, out: np.ndarray
) -> None:
    """Decode groups that lie one after another. scales, zeros: float32 (groups,); out: float32 (n,).

    codes: uint8 or int32 (n,), whose bits under `mask` from `shift` on are these groups' codes.
    """
    size = out.size // scales.size
    _offsets(codes, _like(codes, shift), _like(codes, mask), zeros, size, out)
    _round(out, dtype)
    rows = out.reshape(-1, size)
    with np.errstate(over="ignore", invalid="ignore"):  # stored scales may hold anything; the caller counts NaN
        np.multiply(rows, scales[:, None], out=rows)
    _round(out, dtype)


def decode_column(
    codes: np.ndarray, shift: int, mask: int, scales: np.ndarray, zeros: np.ndarray, dtype: str, out: np.ndarray
) -> None:
    """Decode one value of each group. All arrays: (n,); otherwise as `decode_rows`."""
    _offsets_across(codes, _like(codes, shift), _like(codes, mask), zeros, out)
    _round(out, dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # likewise
        np.multiply(out, scales, out=out)
    _round(out, dtype)


def _like(codes: np.ndarray, number: int) -> np.generic:
    """Return a number in the codes' own dtype, so that the kernel's arithmetic stays in it."""
    return codes.dtype.type(number)  # type: ignore[no-any-return]
