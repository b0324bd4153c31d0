"""HQQ's solver on a torch device; see kernels/hqq/solver.py for the arithmetic.

All groups are updated side by side, whether they have settled or not, and nothing waits for the device before the end.
A group's sums are taken in the device's order, and the shrinking of errors is that of every weight: zeros differ from
the CPU's in their last bits, and so may the codes of weights midway between two.
"""

from __future__ import annotations

import torch

from loaders.quantization.kernels.device.fused import fused

SMALLEST_RANGE, LARGEST_SCALE = 1e-4, 2e4  # hqq's guards: small ranges, and float16's range


def solve(
    groups: torch.Tensor, top: int, rounds: bool, updates: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find scales and zeros of float32 groups (G, size) by a number of updates.

    Returns scales and zeros, float32 (G,); the last update that moved a zero, uint8 (G,); and the sums of |error|
    before each update, float32 (G, updates).
    """
    # Numbers that differ from call to call are tensors: as Python's, each would be compiled anew.
    top_code = torch.full((), top, dtype=torch.float32, device=groups.device)
    numbers = torch.arange(1, updates + 1, dtype=torch.float32, device=groups.device)
    scaled, scale, zero = _begun(groups, top_code)
    zero = zero.round() if rounds else zero
    moved, errors = torch.zeros_like(zero), []
    for number in numbers.unbind():
        zero, moved, error = _updated(scaled, scale, zero, moved, number, top_code)
        errors.append(error)
    return scale[:, 0], zero[:, 0], moved[:, 0].to(torch.uint8), torch.cat(errors, dim=1)


@fused
def _begun(groups: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return groups times their scales, the scales, and the first zeros, unrounded: (G, size), (G, 1), (G, 1)."""
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    span = high - low
    scale = torch.where(span <= SMALLEST_RANGE, 1.0, top * (1.0 / span)).clamp(max=LARGEST_SCALE)
    return groups * scale, scale, -low * scale


@fused
def _updated(
    scaled: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    moved: torch.Tensor,
    number: torch.Tensor,
    top: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make an update: return the new zeros, the numbers of the last updates that moved them, and the sums of |error|.

    scaled: (G, size), weights times scales; the others, and all results: (G, 1).
    """
    codes = torch.minimum((scaled + zero).round().clamp(min=0), top)
    offsets = codes - scaled
    errors = (zero - offsets) / scale
    sizes = errors.abs()
    # The power of an error of 0 is infinite, and what is below 0 is none.
    shrunk = (sizes - 0.1 * sizes.pow(-0.3)).clamp(min=0)
    found = (offsets + torch.copysign(shrunk, errors) * scale).mean(1, keepdim=True)
    return found, torch.where(found != zero, number, moved), sizes.sum(1, keepdim=True)
