"""ggml's Q8_0 and Q4_0 on a torch device; see kernels/ggml/blocks.py for blocks and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from loaders.quantization.kernels.device.arithmetic import nibbles, over, tops
from loaders.quantization.kernels.ggml.blocks import N

JUST_BELOW_HALF = 0.5 - 2.0**-25  # the last float32 below one half


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Encode float32 blocks (B, 32): uint8 (B, 34)."""
    scales, inverses, _ = _scales(over(tops(blocks), 127.0))
    steps = blocks * inverses
    away = torch.copysign(torch.full_like(steps, JUST_BELOW_HALF), steps)
    codes = _cut(steps + away).to(torch.int8).view(torch.uint8)
    return torch.cat([scales, codes], dim=1)


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """Encode float32 blocks (B, 32): uint8 (B, 18)."""
    scales, inverses, is_endless = _scales(over(_extremes(blocks), -8.0))
    steps = blocks * inverses + torch.where(is_endless, 0.0, 8.5)
    codes = _cut(steps).clamp(max=15).to(torch.uint8)
    return torch.cat([scales, nibbles(codes[:, : N // 2], codes[:, N // 2 :])], dim=1)


ENCODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"Q8_0": q8_0, "Q4_0": q4_0}


def _extremes(blocks: torch.Tensor) -> torch.Tensor:
    """Return each block's weight of greatest magnitude with its sign, the first of equals; zeros give +0."""
    sizes, largest = blocks.abs(), tops(blocks)
    places = torch.arange(N, device=blocks.device)
    first = torch.where(sizes == largest[:, None], places, N - 1).amin(dim=1)
    found = blocks.gather(1, first[:, None])[:, 0]
    return torch.where(largest.isnan() | (largest == 0), largest, found)


def _scales(d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float16 scales as bytes (B, 2), inverses (B, 1), 0 where they would be infinite, and where those are."""
    inverses = torch.where(d != 0, 1.0 / d, 0.0)[:, None]
    is_endless = inverses.abs() == math.inf
    return d.half().view(torch.uint8).reshape(-1, 2), torch.where(is_endless, 0.0, inverses), is_endless


def _cut(values: torch.Tensor) -> torch.Tensor:
    """Cut numbers to integers as a cast of x86-64 does; of NaN it leaves the low byte 0."""
    return torch.where(values.isnan(), 0.0, values).trunc()
