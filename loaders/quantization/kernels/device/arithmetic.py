"""Arithmetic on a torch device that rounds as the CPU's kernels do.

A divisor is always a tensor on the device: by a number, torch's CUDA kernels multiply with its rounded inverse.
"""

from __future__ import annotations

import torch


def like(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round float32 values to a dtype ("BF16", "F16"; others stay), and keep them as float32."""
    if dtype == "BF16":
        return values.bfloat16().float()
    return values.half().float() if dtype == "F16" else values


def over(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """Divide by a number of float32."""
    return values / torch.full((), divisor, dtype=torch.float32, device=values.device)


def tops(groups: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each row; it is NaN if one is."""
    return groups.abs().amax(dim=1)


def within(values: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """Return the nearest integers within bounds, halves to even; a NaN becomes the lowest."""
    return torch.where(values.isnan(), float(lowest), values).clamp(lowest, highest).round()


def nibbles(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return bytes of two codes of four bits, uint8 both."""
    return low | high << 4
