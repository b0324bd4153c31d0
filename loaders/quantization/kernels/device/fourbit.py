"""NF4 and FP4 on a torch device; see kernels/bitsandbytes/fourbit.py for the arithmetic."""

from __future__ import annotations

from functools import cache

import torch

from loaders.quantization.kernels.bitsandbytes import tables
from loaders.quantization.kernels.device import triton_launch
from loaders.quantization.kernels.device.arithmetic import nibbles, tops


def fourbit_codes(groups: torch.Tensor, table: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Code groups (G, group) of a float dtype: packed codes, the first of a byte high, and largest magnitudes (G,)."""
    bounds, order = _table(table, groups.device)
    if triton_launch.takes(groups) and groups.dtype != torch.float64:
        return triton_launch.encode_fourbit(groups, bounds, order)
    groups = groups.float()
    largest = tops(groups)
    scaled = groups * (1.0 / largest.clamp(min=1e-38))[:, None]
    codes = order[torch.bucketize(scaled.reshape(-1).clamp(-1, 1), bounds)]
    return nibbles(codes[1::2], codes[::2]), largest


@cache  # a copy from memory that is not page-locked makes a thread wait for all that it has begun
def _table(name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a table's bounds and codes by rank, on the device."""
    code = tables.table(name)
    return torch.from_numpy(code.bounds[:15]).to(device), torch.from_numpy(code.order).to(device)
