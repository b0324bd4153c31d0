"""Decoders on a torch device, in float32, by the arithmetic of the CPU's. They share no code with the encoders.

What roles and blocks hold is described in the schemes and in kernels/ggml. Codes and raw numbers are bytes, uint8; all
return float32 (n,).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from loaders.quantization.kernels.bitsandbytes import tables
from loaders.quantization.kernels.device import triton_launch
from loaders.quantization.kernels.device.transfers import DTYPES
from loaders.quantization.kernels.read_only.fp8_int8 import E4M3


def floats(raw: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return raw numbers of a float dtype as float32."""
    return raw.view(DTYPES[dtype]).float()


def fourbit(packed: torch.Tensor, absmax: torch.Tensor, table: str, group: int) -> torch.Tensor:
    """Return table[code] * absmax. packed: (n / 2,), the first code of a byte high; absmax: float32 (n / group,)."""
    if triton_launch.takes(packed):
        return triton_launch.decode_fourbit(packed, absmax, _values(table, packed.device), group)
    values = _pairs(table, packed.device).index_select(0, packed.int())
    return (values.reshape(-1, group) * absmax[:, None]).reshape(-1)


@cache
def _values(table: str, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(tables.table(table).values).to(device)


@cache
def _pairs(table: str, device: torch.device) -> torch.Tensor:
    """Return the two values of every byte: float32 (256, 2)."""
    values, byte = tables.table(table).values, np.arange(256)
    return torch.from_numpy(np.stack([values[byte >> 4], values[byte & 15]], axis=1)).to(device)


def llm_int8(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Return (code * absmax) * fl(1/127). codes: (rows * columns,); absmax: float32 (rows,)."""
    rows = codes.view(torch.int8).reshape(absmax.numel(), -1).float()
    return ((rows * absmax[:, None]) * float(np.float32(1 / 127))).reshape(-1)


def int8_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return code * scale, a scale a row."""
    return (codes.view(torch.int8).reshape(scales.numel(), -1).float() * scales[:, None]).reshape(-1)


def e4m3_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the values of E4M3 codes times a scale a row."""
    values = _e4m3(codes.device).index_select(0, codes.int())
    return (values.reshape(scales.numel(), -1) * scales[:, None]).reshape(-1)


@cache
def _e4m3(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(E4M3).to(device)


def packed_int(packed: torch.Tensor, bits: int, scales: torch.Tensor, shifts: torch.Tensor | float) -> torch.Tensor:
    """Return (code - shift) * scale. packed: codes of 4 bits, the first low, or of 8; scales: float32 (groups,)."""
    codes = torch.stack([packed & 15, packed >> 4], dim=1) if bits == 4 else packed
    return ((codes.reshape(scales.numel(), -1).float() - shifts) * scales[:, None]).reshape(-1)


def zero_points(words: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """Return the shifts of packed zero points, float32 (rows * groups, 1). words: int32 as bytes, eight rows each."""
    places = 4 * torch.arange(8, device=words.device, dtype=torch.int32)
    codes = words.view(torch.int32).reshape(-1, 1, groups) >> places[:, None] & 15
    return codes.reshape(-1, groups)[:rows].reshape(-1, 1).float()


def affine(packed: torch.Tensor, bits: int, scales: torch.Tensor, biases: torch.Tensor) -> torch.Tensor:
    """Return code * scale + bias. packed: a stream of bits, the first lowest; scales, biases: float32 (groups,)."""
    wide = torch.zeros(packed.numel() // bits, dtype=torch.int64, device=packed.device)
    for byte, column in enumerate(packed.reshape(-1, bits).unbind(1)):
        wide |= column.long() << 8 * byte
    codes = torch.stack([wide >> bits * place & (1 << bits) - 1 for place in range(8)], dim=1)
    return (codes.reshape(scales.numel(), -1).float() * scales[:, None] + biases[:, None]).reshape(-1)


# --- ggml's blocks, uint8 (blocks, bytes)


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return (blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)).reshape(-1)


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], dim=1)
    return ((codes.float() - 8) * _half(blocks, 0)).reshape(-1)


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    both = blocks[:, :16]
    return _line(_two_bits(blocks[:, 16:80]).reshape(-1, 16, 16), both & 15, both >> 4, blocks, 80)


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return _line(_nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32), *_six_bits(blocks[:, 4:16]), blocks, 0)


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    places = torch.arange(8, device=blocks.device, dtype=torch.uint8)[:, None]
    fifths = (blocks[:, None, 16:48] >> places & 1) << 4
    return _line(_nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | fifths, *_six_bits(blocks[:, 4:16]), blocks, 0)


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, :128], 64) | _two_bits(blocks[:, 128:192]) << 4
    scales = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    return ((codes.reshape(-1, 16, 16).float() - 32) * scales[:, :, None]).reshape(-1)


BLOCKS = {"Q8_0": q8_0, "Q4_0": q4_0, "Q2_K": q2_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 at byte `at` of each block, as float32 (blocks, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _line(codes: torch.Tensor, scales: torch.Tensor, lows: torch.Tensor, blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return d s q - dmin m, where d and dmin are at byte `at`. codes: (blocks, sub-blocks, n); scales, lows: s, m."""
    scale, low = _half(blocks, at) * scales.float(), _half(blocks, at + 2) * lows.float()
    return (codes.float() * scale[:, :, None] - low[:, :, None]).reshape(-1)


def _nibbles(raw: torch.Tensor, run: int) -> torch.Tensor:
    """Return codes of four bits: of each `run` bytes first all low ones, then all high ones. uint8 (blocks, codes)."""
    runs = raw.reshape(raw.shape[0], -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], dim=2).reshape(raw.shape[0], -1)


def _two_bits(raw: torch.Tensor) -> torch.Tensor:
    """Return codes of two bits: each 32 bytes hold four runs of 32. uint8 (blocks, codes)."""
    places = 2 * torch.arange(4, device=raw.device, dtype=torch.uint8)[:, None]
    return (raw.reshape(raw.shape[0], -1, 1, 32) >> places & 3).reshape(raw.shape[0], -1)


def _six_bits(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and minima (blocks, 8) from their twelve bytes: ggml's get_scale_min_k4."""
    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    return scales, torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
