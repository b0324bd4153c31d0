"""HQQ's solver on a torch device; see kernels/hqq/solver.py for the arithmetic.

All groups are updated side by side, whether they have settled or not, and nothing waits for the device before the end.
A group's sums are taken in the device's order, and the shrinking of errors is that of every weight: zeros differ from
the CPU's in their last bits, and so may the codes of weights midway between two.
"""

from __future__ import annotations

import torch

from loaders.quantization.kernels.device import triton_launch, triton_search

SMALLEST_RANGE, LARGEST_SCALE = 1e-4, 2e4  # hqq's guards: small ranges, and float16's range


def solve(
    groups: torch.Tensor, top: int, rounds: bool, updates: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find scales and zeros of float32 groups (G, size) by a number of updates.

    Returns scales and zeros, float32 (G,); the last update that moved a zero, uint8 (G,); and the sums of |error|
    before each update, float32 (G, updates).
    """
    if triton_launch.takes(groups):
        return triton_search.solve_hqq(groups, top, rounds, updates)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    span = high - low
    scale = torch.where(span <= SMALLEST_RANGE, 1.0, top * (1.0 / span)).clamp(max=LARGEST_SCALE)
    scaled, zero = groups * scale, -low * scale
    zero = zero.round() if rounds else zero
    moved, errors = torch.zeros_like(zero), []
    for number in range(1, updates + 1):
        found, error = _updated(scaled, scale, zero, top)
        moved, zero = torch.where(found != zero, float(number), moved), found
        errors.append(error)
    return scale[:, 0], zero[:, 0], moved[:, 0].to(torch.uint8), torch.cat(errors, dim=1)


def _updated(
    scaled: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make an update: return the new zeros and the sums of |error| before it.

    scaled: (G, size), weights times scales; the others: (G, 1).
    """
    offsets = (scaled + zero).round().clamp(0, top) - scaled
    errors = (zero - offsets) / scale
    sizes = errors.abs()
    # The power of an error of 0 is infinite, and what is below 0 is none.
    shrunk = (sizes - 0.1 * sizes.pow(-0.3)).clamp(min=0)
    found = (offsets + torch.copysign(shrunk, errors) * scale).mean(1, keepdim=True)
    return found, sizes.sum(1, keepdim=True)
