"""What only HQQ's parts need: the rounding of its decoder, the stop of its solver."""

from __future__ import annotations

import math
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numba import njit, typeof
from numba.core import types

from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.quantization.kernels import casts
from loaders.quantization.kernels.hqq import decode, encode, solver
from loaders.quantization.kernels.lanes import Array, Lanes, vector
from loaders.quantization.schemes.hqq import UPDATES, Hqq
from tests.encoding import DTYPE_NAMES, MemoryView, random

EDGES = [0.0, -0.0, 65503.9, 65519.99, 65520.0, 7e4, 3e38, np.inf, -np.inf, np.nan, 2.0**-14, 2.0**-24, 2.0**-25, 1e-40]


@vector(types.void)
def round_sixteen(lanes: Lanes, values: Array, at: Any, like: Array) -> None:
    lanes.store(decode._rounded(lanes, lanes.load(values, at, 16), like), values, at)


@njit
def round_all(values, like):  # type: ignore[no-untyped-def]
    for at in range(0, values.size // 16 * 16, 16):
        round_sixteen(values, at, like)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_round_to_the_compute_dtype_as_casts_do(dtype: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    narrow = rng.integers(0, 1 << 16, 50_000).astype(np.uint16).view(np.float16).astype(np.float32)
    narrow = narrow[np.isfinite(narrow)]
    beside = np.nextafter(narrow, np.float32(0))
    values = np.concatenate([np.array(EDGES, np.float32), bits, narrow, beside, narrow * np.float32(1.5)])
    values = values[: values.size // 16 * 16]
    wanted = casts.to_float32(casts.cast(values, "F32", dtype), dtype)
    found = values.copy()
    round_all(found, np.zeros(1, {"BF16": np.uint16, "F16": np.int16, "F32": np.float32}[dtype]))
    assert np.array_equal(found, wanted, equal_nan=True)
    numbers = ~np.isnan(wanted)
    assert np.array_equal(np.signbit(found[numbers]), np.signbit(wanted[numbers]))


@pytest.mark.parametrize("dtype", [*DTYPE_NAMES, "F64"])
def test_weights_of_one_dtype_reach_the_kernels_as_arrays_of_one_type(dtype: str) -> None:
    """Whichever way they are read: for each type of its arguments, numba compiles a kernel anew."""
    raw = random((64, 96), dtype)
    with Crew(1) as crew:
        work = ThreadedWork(kernels_of("cpu"), crew, threading.Event())
        found = {
            typeof(Hqq(axis=axis)._groups(MemoryView(raw), first, last, work)[0])  # type: ignore[arg-type]
            for axis, first, last in ((1, 0, 8), (0, 0, 96), (0, 8, 24))
        }
    assert len(found) == 1


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
    with Crew(1) as crew:
        found = scheme._updates(MemoryView(raw), ThreadedWork(kernels_of("cpu"), crew, threading.Event()))
    assert abs(found - wanted) <= 1  # float32 sums against float64's
    assert all(a > b for a, b in pairwise(means[: found - 1]))


def test_tiles_are_added_as_if_exactly() -> None:
    rng = np.random.default_rng(6)
    errors = np.abs(rng.standard_normal((900, 20))) * 10.0 ** rng.integers(-12, 12, (900, 20))
    totals = np.empty(20)
    solver.add_tiles(errors, totals)
    assert totals.tolist() == [math.fsum(column) for column in errors.T]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_scales_and_zeros_are_stored_as_casts_round_them(dtype: str) -> None:
    rng = np.random.default_rng(8)
    scales, zeros = (
        rng.integers(0, 1 << 32, 4096, np.uint32).view(np.float32),
        np.append(rng.standard_normal(4088), [*EDGES[2:9], np.nan]).astype(np.float32),
    )
    scales = np.abs(np.nan_to_num(scales, posinf=1, neginf=1)) + np.float32(1e-30)
    stored = [np.empty(scales.size, {"BF16": np.uint16, "F16": np.int16, "F32": np.float32}[dtype]) for _ in range(2)]
    codes = np.zeros(8 * scales.size, np.uint8)
    encode.code_rows(np.zeros(codes.size, np.float32), 8, scales, zeros, np.float32(15), 0, codes, *stored)
    for found, values in zip(stored, (np.float32(1) / scales, zeros), strict=True):
        wanted = casts.cast(values, "F32", dtype)
        assert np.array_equal(found.view(wanted.dtype), wanted, equal_nan=dtype != "BF16")
