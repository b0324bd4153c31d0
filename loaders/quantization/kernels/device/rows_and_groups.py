"""Codes of a torch device with a scale a row or a group: LLM.int8(), and compressed-tensors' integers and E4M3.

For the arithmetic see kernels/bitsandbytes/int8.py, compressed_tensors/packed_int.py and compressed_tensors/fp8.py. In
a row or group with a NaN or an infinity the CPU and a GPU may give a NaN another sign; a gate refuses such weights.
"""

from __future__ import annotations

import torch

from loaders.quantization.kernels.device.arithmetic import like, nibbles, over, tops, within

E4M3_TOP = 448.0


def int8_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Code float32 rows (R, C) as LLM.int8(): int8 (R, C), and largest magnitudes (R,) after rounding to float16."""
    half = like(rows, "F16")
    largest = tops(half)
    codes = (half * ((1.0 / largest) * 127)[:, None]).round()
    is_coded = (largest > 0) & largest.isfinite()
    return torch.where(is_coded[:, None], codes, 0.0).to(torch.int8), largest


def packed_groups(groups: torch.Tensor, dtype: str, bits: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Code float32 groups (G, group) symmetrically: packed uint8, and scales (G,) in the weights' dtype."""
    half = 1 << (bits - 1)
    scales = _scales(groups, dtype, half - 0.5, eps)
    codes = within(like(groups / scales[:, None], dtype), -half, half - 1)
    return _packed(codes + half, bits), scales


def packed_zero_groups(groups: torch.Tensor, dtype: str, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code float32 groups (G, group) by four bits with a zero point: packed uint8, scales (G,), zeros int8 (G,)."""
    least, greatest = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
    scales = like(over(like(greatest - least, dtype), 15.0), dtype)
    raw = like(-8.0 - like(least / scales, dtype), dtype)
    zeros = torch.where(raw.isnan(), 0.0, within(raw, -8, 7))
    scales = torch.where(scales == 0, eps, scales)
    quotients = like(groups / scales[:, None], dtype)
    codes = within(like(quotients + zeros[:, None], dtype), -8, 7)
    return _packed(codes + 8, 4), scales, zeros.to(torch.int8)


def integer_rows(rows: torch.Tensor, dtype: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Code float32 rows (R, C) symmetrically by eight bits: int8 (R, C), and scales (R,) in the weights' dtype."""
    scales = _scales(rows, dtype, 127.5, eps)
    return within(like(rows / scales[:, None], dtype), -128, 127).to(torch.int8), scales


def e4m3_rows(rows: torch.Tensor, dtype: str, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Code float32 rows (R, C) as E4M3: uint8 (R, C), and scales (R,) in the weights' dtype."""
    scales = _scales(rows, dtype, E4M3_TOP, eps)
    quotients = like(rows / scales[:, None], dtype).clamp(-E4M3_TOP, E4M3_TOP)
    return quotients.to(torch.float8_e4m3fn).view(torch.uint8), scales


def _scales(rows: torch.Tensor, dtype: str, top: float, eps: float) -> torch.Tensor:
    scales = like(over(tops(rows), top), dtype)
    return torch.where(scales == 0, eps, scales)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack whole float32 codes of four or eight bits, the first low."""
    flat = codes.to(torch.uint8).reshape(-1)
    return nibbles(flat[::2], flat[1::2]) if bits == 4 else flat
