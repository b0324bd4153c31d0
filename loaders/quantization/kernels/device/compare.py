"""The error sums of decoded weights on a torch device, in float64: see kernels/compare.py for what they are.

No step waits for the device. A NaN or an infinity makes the sums so, and only then pairs are told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loaders.quantization.kernels import compare
from loaders.quantization.kernels.device import triton_launch

SLOTS = (compare.ERROR2, compare.SOURCE2, compare.DECODED2, compare.PRODUCT, compare.MAX_ERROR)  # of `sums`
COUNTS = (compare.NONFINITE, compare.NONFINITE_DECODED)  # after SLOTS, of `sums_of_finite`


def sums(source: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Return the sums of SLOTS over pairs (n,), the decoded ones float32: float64 (5,)."""
    if triton_launch.takes(source):
        return triton_launch.add_pairs(source, decoded)
    x, y = source.double(), decoded.double()
    error = x - y
    largest = torch.linalg.vector_norm(error, float("inf"))
    return torch.stack([error.dot(error), x.dot(x), y.dot(y), x.dot(y), largest])


def sums_of_finite(source: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """Return the sums of SLOTS over the finite pairs, and the counts of COUNTS: float64 (7,)."""
    is_number = source.isfinite()
    is_pair = is_number & decoded.isfinite()
    found = sums(torch.where(is_pair, source, 0), torch.where(is_pair, decoded, 0))
    return torch.cat([found, torch.stack([(~is_number).sum(), (is_number & ~is_pair).sum()]).double()])


def is_off(
    source: torch.Tensor, decoded: torch.Tensor, group: int, slope: float, ends: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return, as float64 (1,), whether a pair is further apart than a `Grid` allows: see kernels/nearest.py.

    ends: the grid's low, high and half, float32 (groups,).
    """
    low, high, half = (each[:, None] for each in ends)
    x, y = source.reshape(-1, group), decoded.reshape(-1, group)
    clipped = torch.minimum(torch.maximum(x, low), high)
    return ((clipped - y).abs() > half + slope * y.abs()).any().double().reshape(1)
