"""bitsandbytes' dynamic 8-bit map, in which double quantization stores the scales of a four-bit tensor.

The map has 256 values, with decimal exponents from 1e-6 to 1 and a fraction that gets more bits as they grow (Dettmers
2016, arXiv:1511.04561; Dettmers et al. 2022, arXiv:2110.02861). bitsandbytes' CPU library (csrc/cpu_ops.cpp,
quantize_cpu) does not look for the value nearest to x itself: it rounds x to a grid of 65536 points over [-1, 1] and
takes the value nearest to the grid's point, and so does this file. CUDA takes the value nearest to x; the two differ
in about 0.1 % of the codes, by one.
"""

from __future__ import annotations

from functools import cache

import numpy as np

GROUP = 256  # scales that share one scale of their own
STEPS = 65535  # between the least and the greatest point of the grid


@cache
def dynamic_map() -> np.ndarray:
    """Return the map, float32 (256,), rising: what bitsandbytes.functional.create_dynamic_map() gives."""
    values = [0.0, 1.0]
    for exponent in range(-6, 1):
        edges = _linspace(0.1, 1.0, 2 ** (exponent + 6) + 1)
        middles = ((edges[:-1] + edges[1:]) / np.float32(2)) * np.float32(10.0**exponent)
        values += [*middles.tolist(), *(-middles).tolist()]
    return np.sort(np.array(values, np.float32))


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Return what torch.linspace gives in float32, bit for bit.

    torch counts the first half from the start and the second from the end, by a step rounded to float32. It rounds only
    the sum and not the product (a fused multiply-add), which float64 imitates.
    """
    first, last = np.float32(start), np.float32(stop)
    step = float(np.float32((last - first) / np.float32(count - 1)))
    index = np.arange(count)
    near = float(first) + step * index
    far = float(last) - step * (count - 1 - index)
    return np.where(index < count // 2, near, far).astype(np.float32)


@cache
def _grid_codes() -> np.ndarray:
    """Return the code of each point of the grid: uint8 (65536,)."""
    codes = dynamic_map().astype(np.float64)
    grid = np.arange(STEPS + 1) / STEPS * 2 - 1
    return np.searchsorted((codes[:-1] + codes[1:]) / 2, grid).astype(np.uint8)


def encode(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Code finite float32 values (n,) in groups of 256: uint8 (n,) and float32 (ceil(n / 256),) largest magnitudes."""
    starts = np.arange(0, values.size, GROUP)
    tops = np.maximum.reduceat(np.abs(values), starts)
    each = np.repeat(tops, GROUP)[: values.size]
    one, half = np.float32(1), np.float32(0.5)
    # A group of zeros divides by zero; its steps are set to 0 below.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = values * (one / each)
        steps = np.floor((scaled + one) * half * np.float32(STEPS) + half)
    steps = np.where(each == 0, 0, np.clip(steps, 0, STEPS))
    return _grid_codes()[steps.astype(np.int64)], tops


def decode(codes: np.ndarray, tops: np.ndarray) -> np.ndarray:
    """Decode uint8 codes (n,) by the groups' largest magnitudes: float32 (n,)."""
    return np.asarray(dynamic_map()[codes] * np.repeat(tops, GROUP)[: codes.size])
