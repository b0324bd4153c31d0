"""MLX's affine codes on a torch device; see kernels/mlx/affine.py for the arithmetic.

The codes of NaN, and of a group with an infinity, may differ from the CPU's; a gate refuses such weights.
"""

from __future__ import annotations

import math

import torch

from loaders.quantization.kernels.device.arithmetic import over
from loaders.quantization.kernels.mlx.affine import SMALLEST_SCALE, TO_INTEGER


def affine_groups(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code float32 groups (G, group): packed uint8 (n * bits / 8,), scales and biases (G,), not yet rounded."""
    is_nan, top = groups.isnan(), (1 << bits) - 1
    low = torch.where(is_nan, math.inf, groups).amin(dim=1)
    high = torch.where(is_nan, -math.inf, groups).amax(dim=1)
    is_low = low.abs() > high.abs()
    scales = over(high - low, float(top))
    smallest = torch.full((), SMALLEST_SCALE, dtype=torch.float32, device=groups.device)
    scales = torch.where(scales > smallest, scales, smallest)
    scales = torch.where(is_low, scales, -scales)
    edge = torch.where(is_low, low, high)
    steps = (edge / scales).round()
    has_steps = steps != 0
    scales = torch.where(has_steps, edge / steps, scales)
    biases = torch.where(has_steps, edge, 0.0)
    quotients = (groups - biases[:, None]) / scales[:, None]
    # Steps are counted from the bias, an end of the range, so that only the upper bound needs clipping.
    whole = (quotients + TO_INTEGER).view(torch.int32) & 0xFFFF
    codes = torch.where(quotients.isnan(), 0, whole.clamp(max=top))
    return _stream(codes.reshape(-1, 8), bits), scales, biases


def _stream(eights: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack int32 codes (m, 8) into a stream of bits, the first lowest: `bits` bytes for every eight."""
    if bits == 8:
        return eights.to(torch.uint8).reshape(-1)
    wide = torch.zeros(eights.shape[0], dtype=torch.int64, device=eights.device)
    for place in range(8):
        wide |= eights[:, place].to(torch.int64) << (bits * place)
    return torch.stack([(wide >> 8 * byte & 0xFF).to(torch.uint8) for byte in range(bits)], dim=1).reshape(-1)
