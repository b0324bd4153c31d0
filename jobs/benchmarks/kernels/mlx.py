"""The rows of MLX's formats in `weightmill bench kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jobs.benchmarks.kernels.measuring import measuring
from jobs.benchmarks.timing import Case
from loaders.backends.threads import RANGE
from loaders.quantization.kernels import casts
from loaders.quantization.kernels.mlx import affine
from loaders.quantization.schemes.mlx_affine import MlxAffine
from loaders.quantization.schemes.mlx_float import SETTINGS, FloatMode, MlxFloat


def ours(
    weight: np.ndarray, threads: int, spread: Callable[[Callable[[int, int], object], int], None]
) -> Iterator[Case]:
    """Yield our cases; `spread` calls a body for ranges of the weights on the threads that are timed."""
    flat = weight.reshape(-1)
    packed, scales = np.empty(flat.size, np.uint8), np.empty((2, flat.size // 16), np.float32)
    small = np.empty(flat.size // 16, np.uint8)

    def affine_of(bits: int) -> Callable[[], None]:
        def part(a: int, b: int) -> None:
            own = slice(a // 64, b // 64)
            codes = packed[a * bits // 8 : b * bits // 8]
            affine.encode(flat[a:b], bits, 64, codes, scales[0, own], scales[1, own])
            for each in scales[:, own]:
                casts.cast(each, "F32", "BF16")

        return lambda: spread(part, flat.size)

    def small_floats(mode: FloatMode) -> Callable[[], None]:
        scheme = MlxFloat(mode)

        def part(a: int, b: int) -> None:
            for at in range(a, b, RANGE):
                end = min(at + RANGE, b)
                own = small[at // scheme.group_size : end // scheme.group_size]
                scheme.code(flat[at:end], packed[at * scheme.bits // 8 : end * scheme.bits // 8], own)

        return lambda: spread(part, flat.size)

    measure = measuring(weight, MlxAffine(4, 64), threads)
    yield Case("mlx affine 8 bits, bf16", affine_of(8))
    yield Case("mlx affine 4 bits, bf16", affine_of(4))
    yield Case("mlx affine 4 bits decode + compare (measuring)", measure, after="mlx affine 4 bits, bf16")
    for mode in SETTINGS:
        yield Case(f"mlx {mode}, bf16", small_floats(mode))


def peers(weight: np.ndarray, mx: Any) -> Iterator[Case]:
    """Yield mlx's own cases on the CPU. `mx` is mlx.core, or None if it is not installed."""
    if mx:
        mx.set_default_device(mx.cpu)
    tensor: Any = mx.array(weight).view(mx.bfloat16) if mx else None

    def quantize(mode: str, bits: int, group: int) -> Callable[[], None]:
        return lambda: mx.eval(mx.quantize(tensor, group_size=group, bits=bits, mode=mode))

    cases = {f"affine {bits} bits": ("affine", bits, 64) for bits in (8, 4)}
    cases |= {mode: (mode, *SETTINGS[mode]) for mode in SETTINGS}
    for name, settings in cases.items():
        call, missing = (quantize(*settings), "") if mx else (None, "not installed: mlx")
        yield Case(f"mx.quantize {name}, bf16", call, missing, f"mlx {name}, bf16")
