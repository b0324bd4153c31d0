"""The searches of HQQ and of ggml's K-quants as one kernel each, for CUDA devices.

A search goes over the same weights dozens of times. By torch, each operation is a kernel that reads and writes the
GPU's memory and is launched from Python; here a program holds its weights in registers, or reads them from its first
cache, until it is through.

The arithmetic is that of hqq.py and k_quant_search.py. For the K-quants it is so operation by operation, weight by
weight: products and sums are not contracted (`enable_fp_fusion`), and quotients and roots are the nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from loaders.quantization.kernels.device.k_quant_search import LineSearch

SUB_BLOCKS = 128  # that a program searches, one in each thread
WEIGHTS = 4096  # that a program of HQQ's holds: 32 in each thread


def solve_hqq(
    groups: torch.Tensor, top: int, rounds: bool, updates: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do as `hqq.solve` does."""
    from loaders.quantization.kernels.device import triton_kernels as kernels

    count, size = groups.shape
    scales, zeros = (torch.empty(count, dtype=torch.float32, device=groups.device) for _ in range(2))
    moved = torch.empty(count, dtype=torch.uint8, device=groups.device)
    errors = torch.empty((count, updates), dtype=torch.float32, device=groups.device)
    padded = 1 << (size - 1).bit_length()
    rows = max(1, WEIGHTS // padded)
    kernels.solve_hqq[-(-count // rows),](
        groups, scales, zeros, moved, errors, count, size, float(top), updates,
        ROUNDS=rounds, PADDED=padded, ROWS=rows,
    )  # fmt: skip
    return scales, zeros, moved, errors


def search_line(
    x: torch.Tensor, line: LineSearch, reaches: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do as `k_quant_search.search_line` does. reaches: float32 (tries,), the steps between the ends."""
    from loaders.quantization.kernels.device import triton_kernels as kernels

    size, count = x.shape
    scales, lows, codes = torch.empty_like(x[0]), torch.empty_like(x[0]), torch.empty_like(x)
    kernels.search_line[_programs(count)](
        x, reaches, scales, lows, codes, count, float(line.top), line.tries,
        N=size, BY_SQUARE=line.by_square, BLOCK=SUB_BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip
    return scales, lows, codes


def search_scale(x: torch.Tensor, top: torch.Tensor, reaches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of `k_quant_search.search_scale` and the steps of their codes, (S,).

    top: the weight of greatest magnitude of each sub-block, (S,); reaches: float32 (tries,), to which it is taken.
    """
    from loaders.quantization.kernels.device import triton_kernels as kernels

    size, count = x.shape
    scales, steps = torch.empty_like(top), torch.empty_like(top)
    kernels.search_scale[_programs(count)](
        x, top, reaches, scales, steps, count, reaches.numel(), N=size, BLOCK=SUB_BLOCKS, enable_fp_fusion=False
    )
    return scales, steps


def _programs(count: int) -> tuple[Any, ...]:
    return (-(-count // SUB_BLOCKS),)
