"""ggml's K-quants on a torch device: Q2_K, Q4_K, Q5_K and Q6_K; see kernels/ggml/k_quants.py for blocks and arithmetic.

Blocks are float32 (B, 256), and become uint8 (B, bytes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from loaders.quantization.kernels.device.arithmetic import nibbles
from loaders.quantization.kernels.device.k_quant_search import LINES, NOTHING, extreme, search_line, search_scale

SUPER = 256  # weights in a super-block


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    d, dmin, s, m, codes = _line(blocks, "Q2_K", 15)
    return torch.cat([s | m << 4, _quarters(codes), d, dmin], dim=1)


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    d, dmin, s, m, codes = _line(blocks, "Q4_K", 63)
    return torch.cat([d, dmin, *_six_bits(s, m), _pairs(codes, 32)], dim=1)


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    d, dmin, s, m, codes = _line(blocks, "Q5_K", 63)
    places = torch.arange(8, device=blocks.device, dtype=torch.uint8)[:, None]
    fifths = (codes.reshape(-1, 8, 32) >> 4 << places).sum(1, dtype=torch.uint8)
    return torch.cat([d, dmin, *_six_bits(s, m), fifths, _pairs(codes & 15, 32)], dim=1)


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    x = blocks.reshape(-1, 16).T.contiguous()
    found, codes = search_scale(x)
    scales = found.reshape(-1, 16)
    top = extreme(scales, 1)
    is_nothing = top.abs() < NOTHING
    inverse = torch.where(is_nothing, 0.0, -128.0 / top)
    d = torch.where(is_nothing, 0.0, 1.0 / inverse).half()
    s = _number((inverse * scales).round()).clamp(max=127)
    codes = _again(x, codes, (d.float() * s).reshape(-1), torch.zeros_like(found), -32, 31)
    small = torch.where(is_nothing, 0, codes + 32).to(torch.uint8)
    packed = [_pairs(small & 15, 64), _quarters(small >> 4)]
    return torch.cat([*packed, s.to(torch.int8).view(torch.uint8), _raw(d)], dim=1)


ENCODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"Q2_K": q2_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def _line(blocks: torch.Tensor, kind: str, most: int) -> tuple[torch.Tensor, ...]:
    """Search the lines of sub-blocks, and code them by scales and minima of 0 to `most` steps of d and dmin.

    Returns d and dmin as bytes (B, 2); scales, minima (B, sub-blocks) and codes (B, 256), uint8.
    """
    line = LINES[kind]
    x = blocks.reshape(-1, line.size).T.contiguous()
    found, lows, codes = search_line(x, line)
    (d, s), (dmin, m) = (_steps(each.reshape(-1, SUPER // line.size), most) for each in (found, -lows))
    scales, minima = (d.float() * s).reshape(-1), (dmin.float() * m).reshape(-1)
    codes = _again(x, codes, scales, minima, 0, line.top)
    return _raw(d), _raw(dmin), s.to(torch.uint8), m.to(torch.uint8), codes.to(torch.uint8)


def _steps(values: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a step (B, 1), float16, and how many of it each value is, whole float32 (B, sub-blocks)."""
    largest = values.amax(1, keepdim=True).clamp(min=0) + 0.0  # no -0, which would be another byte
    count = torch.full_like(largest, most)
    inverse = torch.where(largest > 0, count / largest, 0.0)
    return (largest / count).half(), _number((inverse * values).round()).clamp(0, most)


def _again(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, least: int, top: int
) -> torch.Tensor:
    """Find the codes again by the scales as they are stored; where one is 0, the codes of the search stay: (B, 256)."""
    found = torch.where(scale == 0, codes, ((x + low) / scale).round().clamp(least, top))
    return _number(found).T.reshape(-1, SUPER)


def _number(values: torch.Tensor) -> torch.Tensor:
    """Replace NaN, which a gate refuses, by 0: the integer of a NaN is not defined."""
    return torch.where(values.isnan(), 0.0, values)


def _raw(half: torch.Tensor) -> torch.Tensor:
    return half.view(torch.uint8).reshape(-1, 2)


def _six_bits(s: torch.Tensor, m: torch.Tensor) -> list[torch.Tensor]:
    """Return the twelve bytes of eight scales and minima: the upper two bits of the last four lie above the first."""
    upper = [each[:, :4] | each[:, 4:] >> 4 << 6 for each in (s, m)]
    return [*upper, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4]


def _pairs(codes: torch.Tensor, run: int) -> torch.Tensor:
    """Pack codes of four bits: of 2 * `run` codes, the first half low and the second high. codes: uint8 (B, n)."""
    halves = codes.reshape(codes.shape[0], -1, 2, run)
    return nibbles(halves[:, :, 0], halves[:, :, 1]).reshape(codes.shape[0], -1)


def _quarters(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes of two bits: a byte holds those of weights 32 apart in each 128, the first lowest."""
    runs = codes.reshape(codes.shape[0], -1, 4, 32)
    return (runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6).reshape(codes.shape[0], -1)
