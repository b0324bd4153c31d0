"""What only HQQ's parts need: the rounding of its decoder, the stop of its solver."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from loaders.backends import kernels_of
from loaders.backends.threads import ThreadedWork
from loaders.quantization.kernels import casts
from loaders.quantization.kernels.hqq import decode
from loaders.quantization.schemes.hqq import UPDATES, Hqq
from tests.encoding import MemoryView, random

EDGES = [0.0, -0.0, 65503.9, 65519.99, 65520.0, 7e4, 3e38, np.inf, -np.inf, np.nan, 2.0**-14, 2.0**-24, 2.0**-25, 1e-40]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_round_to_the_compute_dtype_as_casts_do(dtype: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    narrow = rng.integers(0, 1 << 16, 50_000).astype(np.uint16).view(np.float16).astype(np.float32)
    narrow = narrow[np.isfinite(narrow)]
    beside = np.nextafter(narrow, np.float32(0))
    values = np.concatenate([bits, narrow, beside, narrow * np.float32(1.5), np.array(EDGES, np.float32)])
    wanted = casts.to_float32(casts.cast(values, "F32", dtype), dtype)
    found = values.copy()
    decode._round(found, dtype)
    assert np.array_equal(found, wanted, equal_nan=True)
    numbers = ~np.isnan(wanted)
    assert np.array_equal(np.signbit(found[numbers]), np.signbit(wanted[numbers]))


@pytest.mark.parametrize("bits", [4, 2])
def test_the_search_ends_one_update_past_the_one_whose_error_stopped_falling(bits: int) -> None:
    """By its definition in float64, a group at a time; the sources are such that nothing shrinks."""
    scheme, raw = Hqq(bits), random((64, 96), "F32", seed=5)  # type: ignore[arg-type]
    groups = raw.data.astype(np.float64).reshape(-1, 64)
    low, high, top = groups.min(1, keepdims=True), groups.max(1, keepdims=True), 2**bits - 1
    scale = top / (high - low)
    zero = np.round(-low * scale) if bits == 4 else -low * scale
    means = []
    for _ in range(UPDATES):
        codes = np.clip(np.round(groups * scale + zero), 0, top)
        means.append(np.abs(groups - (codes - zero) / scale).mean())
        zero = (codes - groups * scale).mean(1, keepdims=True)
    wanted = next((i + 1 for i in range(1, UPDATES) if not means[i] < means[i - 1] * (1 - 1e-7)), UPDATES)
    with ThreadPoolExecutor(1) as pool:
        found = scheme._updates(MemoryView(raw), ThreadedWork(kernels_of("cpu"), pool, threading.Event()))
    assert abs(found - wanted) <= 1  # float32 sums against float64's
    assert all(a > b for a, b in pairwise(means[: found - 1]))
