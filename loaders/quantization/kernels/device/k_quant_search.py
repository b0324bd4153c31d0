"""The searches of ggml's K-quants on a torch device: see kernels/ggml/search_line.py and search.py for the arithmetic.

All sub-blocks are searched side by side. Weights are float32 (n, S), a column for each sub-block, as on the CPU, and
sums are taken weight by weight in the CPU's order: where one weight outweighs the others, the fit is a difference of
large numbers, and another order would find other lines. Scales, least values and the like are (S,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loaders.quantization.kernels.device import triton_launch, triton_search

NOTHING = 1e-15  # ggml's GROUP_MAX_EPS: a sub-block of Q6_K whose magnitudes are all below it is zero
Found = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class LineSearch:
    """make_qkx2_quants with a type's settings: a line scale * code + low, with codes from 0 to `top`.

    Tries are by top + first + 0.1 * i steps between the least weight and the greatest. `by_square` adds each
    sub-block's root mean square to its weights' importance |x|, and measures misfits by squares, not magnitudes.
    """

    size: int
    top: int
    first: float
    tries: int
    by_square: bool


LINES = {
    "Q2_K": LineSearch(16, 3, -0.5, 16, False),
    "Q4_K": LineSearch(32, 15, -1.0, 21, True),
    "Q5_K": LineSearch(32, 31, -0.5, 16, True),
}


def search_line(x: torch.Tensor, line: LineSearch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scales and least values (S,), and codes (n, S), as float32."""
    reaches = _tenths(torch.arange(line.tries, device=x.device)) + line.first + line.top
    if triton_launch.takes(x):
        return triton_search.search_line(x, line, reaches)
    weights = x.abs()
    if line.by_square:
        # torch's root of float32 is not always the nearest on a CPU.
        mean = _sum(x * x) / torch.full((), x.shape[0], dtype=torch.float32, device=x.device)
        weights = mean.double().sqrt().float() + weights
    low, high = x.amin(0).clamp(max=0), x.amax(0)
    sum_w, sum_x = _sum(weights), _sum(weights * x)

    def misfit(codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        missed = scale * codes + low - x
        return _sum(weights * (missed * missed if line.by_square else missed.abs()))

    step = torch.full_like(high, line.top) / (high - low)
    scale, step = 1.0 / step, _finite(step)
    best: Found = (scale, low, misfit(_codes(x, step, low, line.top), scale, low), step, low)
    for reach in reaches.unbind():
        start = best[1]
        step = _finite(reach / (high - start))
        codes = _codes(x, step, start, line.top)
        weighted = weights * codes
        sum_l, sum_l2, sum_xl = _sum(torch.stack([weighted, weighted * codes, weighted * x], dim=1))
        d = sum_w * sum_l2 - sum_l * sum_l
        scale, least = (sum_w * sum_xl - sum_x * sum_l) / d, (sum_l2 * sum_x - sum_l * sum_xl) / d
        is_above = least > 0
        scale, least = torch.where(is_above, sum_xl / sum_l2, scale), torch.where(is_above, 0.0, least)
        error = misfit(codes, scale, least)
        is_better = (d > 0) & (error < best[2])
        best = _better(is_better, (scale, least, error, step, start), best)
    scale, least, _, step, start = best
    is_flat = high == low
    codes = _codes(x, torch.where(is_flat, 0.0, step), start, line.top)
    return torch.where(is_flat, 0.0, scale), torch.where(is_flat, low, least), codes


def search_scale(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales (S,) and codes from -32 to 31 (n, S), as float32: make_qx_quants for Q6_K."""
    top = extreme(x, 0)[0]
    steps = torch.arange(-9, 9, device=x.device)
    reaches = _tenths(steps + (steps >= 0)) + 32.0  # from -9 to 9 without 0
    find = triton_search.search_scale if triton_launch.takes(x) else _search_scale
    scale, step = find(x, top, reaches)
    is_nothing = top.abs() < NOTHING
    codes = torch.where(is_nothing, -32.0, (step * x).round().clamp(-32, 31))
    return torch.where(is_nothing, 0.0, scale), codes


def _search_scale(x: torch.Tensor, top: torch.Tensor, reaches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best scales and the steps of their codes, (S,): see `triton_search.search_scale`."""
    square = x * x
    cube = square * x

    def fit(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = (step * x).round().clamp(-32, 31)
        sum_lx, sum_l2 = _sum(torch.stack([cube * codes, square * codes * codes], dim=1))
        return sum_lx, sum_l2

    step = -32.0 / top
    sum_lx, sum_l2 = fit(step)
    scale = torch.where(sum_l2 != 0, sum_lx / sum_l2, 0.0)
    best: Found = (scale, scale * sum_lx, step)
    for reach in reaches.unbind():
        step = -reach / top
        sum_lx, sum_l2 = fit(step)
        is_better = (sum_l2 > 0) & (sum_lx * sum_lx > best[1] * sum_l2)
        scale = sum_lx / sum_l2
        best = _better(is_better, (scale, scale * sum_lx, step), best)
    return best[0], best[2]


def extreme(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the number of greatest magnitude along a dimension, which is kept, with its sign: the first of equals."""
    return values.gather(dim, values.abs().argmax(dim, keepdim=True))


def _tenths(counts: torch.Tensor) -> torch.Tensor:
    """Return count * 0.1f: the searches go by steps of C's 0.1f."""
    whole = counts.float()
    return whole * torch.full_like(whole, 0.1)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """Add rows one after another."""
    total, *others = rows.unbind()
    for row in others:
        total = total + row
    return total


def _better(is_better: torch.Tensor, tried: Found, best: Found) -> Found:
    """Return what was tried where it is better, and elsewhere the best so far."""
    return tuple(torch.where(is_better, new, old) for new, old in zip(tried, best, strict=True))


def _finite(step: torch.Tensor) -> torch.Tensor:
    return torch.where(step.isinf(), 0.0, step)


def _codes(x: torch.Tensor, step: torch.Tensor, low: torch.Tensor, top: int) -> torch.Tensor:
    return (step * (x - low)).round().clamp(0, top)
