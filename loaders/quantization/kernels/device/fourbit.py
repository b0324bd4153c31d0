"""NF4 and FP4 on a torch device; see kernels/bitsandbytes/fourbit.py for the arithmetic."""

from __future__ import annotations

import torch

from loaders.quantization.kernels.bitsandbytes import fourbit
from loaders.quantization.kernels.device.arithmetic import nibbles, tops


def fourbit_codes(groups: torch.Tensor, table: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Code float32 groups (G, group): packed codes, two a byte, the first high, and largest magnitudes (G,)."""
    code, largest = fourbit.table(table), tops(groups)
    scaled = groups * (1.0 / largest.clamp(min=1e-38))[:, None]
    bounds = torch.from_numpy(code.bounds[:15]).to(groups.device)
    ranks = torch.bucketize(scaled.reshape(-1).clamp(-1, 1), bounds)
    codes = torch.from_numpy(code.order).to(groups.device)[ranks]
    return nibbles(codes[1::2], codes[::2]), largest
