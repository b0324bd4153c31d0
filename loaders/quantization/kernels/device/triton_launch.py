"""The start of Triton's kernels of triton_codes.py, and whether there is Triton for a tensor.

torch's wheels for CUDA on Linux bring Triton along.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

WEIGHTS = 4096  # that a program encodes: 32 in each of its threads
BYTES = 1024  # of codes that a program decodes
PAIRS = 1024  # that a program adds at a time
STEPS = 4  # times that it does


def takes(x: torch.Tensor) -> bool:
    """Whether Triton's kernels take a tensor: on CUDA, where there is Triton."""
    return x.is_cuda and _is_there()


@cache
def _is_there() -> bool:
    return find_spec("triton") is not None


def encode_fourbit(
    groups: torch.Tensor, bounds: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as `fourbit.fourbit_codes` does. groups: (G, group) of any float dtype, group a power of two."""
    from loaders.quantization.kernels.device import triton_codes as kernels

    count, group = groups.shape
    packed = torch.empty(groups.numel() // 2, dtype=torch.uint8, device=groups.device)
    largest = torch.empty(count, dtype=torch.float32, device=groups.device)
    rows = max(1, WEIGHTS // group)
    kernels.encode_fourbit[-(-count // rows),](
        groups, bounds, order, packed, largest, count, HALF=group // 2, ROWS=rows, enable_fp_fusion=False
    )
    return packed, largest


def decode_fourbit(packed: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, group: int) -> torch.Tensor:
    """Do as `decode.fourbit` does. values: float32 (16,), by code."""
    from loaders.quantization.kernels.device import triton_codes as kernels

    out = torch.empty(2 * packed.numel(), dtype=torch.float32, device=packed.device)
    kernels.decode_fourbit[-(-packed.numel() // BYTES),](
        packed, absmax, values, out, packed.numel(), HALF=group // 2, BLOCK=BYTES, enable_fp_fusion=False
    )
    return out


def add_pairs(source: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Do as `compare.sums` does. source: (n,) of any float dtype."""
    from loaders.quantization.kernels.device import triton_codes as kernels

    programs = -(-source.numel() // (STEPS * PAIRS))
    sums = torch.empty((5, programs), dtype=torch.float64, device=source.device)
    kernels.add_pairs[programs,](source, decoded, sums, source.numel(), PROGRAMS=programs, STEPS=STEPS, BLOCK=PAIRS)
    return torch.cat([sums[:4].sum(dim=1), sums[4:].amax(dim=1)])
