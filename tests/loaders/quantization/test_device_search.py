"""Searches on a torch device find codes as good as the CPU's: torch's CPU device, and a GPU where there is one."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from loaders.backends.threads import Crew, ThreadedWork
from loaders.errors import VerifyFailed
from loaders.quantization.kernels import Kernels
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.quantization.kernels.hqq import solver
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.ggml import SEARCHED_ON_DEVICE, Ggml
from loaders.quantization.schemes.hqq import BITS, Hqq
from loaders.stats import ErrorSums
from tests.encoding import MemorySink, encode
from tests.loaders.quantization.test_device_kernels import device
from tests.making import weights

pytestmark = pytest.mark.engine

__all__ = ["device"]  # a fixture
SCHEMES: dict[str, Scheme] = {
    **{f"hqq {bits}": Hqq(bits) for bits in BITS},  # type: ignore[arg-type]
    "hqq 4 in columns": Hqq(4, 64, axis=0),
    "hqq 2 of 16": Hqq(2, 16),
    "hqq 8 of 128, float32": Hqq(8, 128, compute_dtype="F32"),
    **{name: Ggml(name) for name in SEARCHED_ON_DEVICE},
}


def made(kind: str) -> np.ndarray:
    """Weights of one kind: normal, with outliers, heavy-tailed, one-sided, far larger, or with rows of zeros."""
    rng = np.random.default_rng(11)
    values: np.ndarray = rng.standard_normal((96, 2048)).astype(np.float32) * np.float32(0.02)
    if kind == "outliers":
        values[rng.random(values.shape) < 1e-3] *= 50
    if kind == "heavy tails":
        values = rng.standard_t(3, values.shape).astype(np.float32)
    if kind == "above zero":
        values = np.abs(values) + np.float32(0.01)
    if kind == "large":
        values *= 1000
    if kind == "zeros":
        values[::3], values[1] = 0, -0.0
    return values


def both(scheme: Scheme, values: np.ndarray, dtype: str, device: Kernels) -> list[tuple[MemorySink, ErrorSums]]:
    found = []
    for kernels in (CpuKernels(), device):
        with Crew(2) as crew:
            found.append(encode(scheme, weights(values, dtype), ThreadedWork(kernels, crew, threading.Event())))
    return found


@pytest.mark.parametrize("kind", ["normal", "outliers", "heavy tails", "above zero", "large", "zeros"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_search_on_a_device_is_within_a_thousandth_of_the_cpus(name: str, kind: str, device: Kernels) -> None:
    (_, ours), (_, theirs) = both(SCHEMES[name], made(kind), "BF16", device)
    assert theirs.relative_error == pytest.approx(ours.relative_error, rel=1e-3)
    assert (theirs.wrong, theirs.nonfinite_decoded) == (0, 0)


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
@pytest.mark.parametrize("name", ["hqq 4", "hqq 4 in columns", "Q4_K", "Q6_K"])
def test_a_device_searches_weights_of_any_dtype(name: str, dtype: str, device: Kernels) -> None:
    values = made("normal").astype(np.float64 if dtype == "F64" else np.float32)
    (_, ours), (_, theirs) = both(SCHEMES[name], values, dtype, device)
    assert theirs.relative_error == pytest.approx(ours.relative_error, rel=1e-3)


@pytest.mark.parametrize("name", ["hqq 4", "hqq 2 of 16", "hqq 4 in columns"])
def test_zeros_that_are_not_kept_are_found_again(name: str, device: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (_, kept) = both(SCHEMES[name], made("large"), "BF16", device)
    monkeypatch.setattr("loaders.quantization.schemes.hqq.KEPT", 0)
    _, (_, again) = both(SCHEMES[name], made("large"), "BF16", device)
    assert again.relative_error == pytest.approx(kept.relative_error, rel=1e-5)


def test_groups_that_are_known_stay_as_they_are(device: Any) -> None:
    x = made("normal").reshape(-1)
    count = x.size // 64
    found = np.zeros(count, np.float32), np.zeros(count, np.float32), np.full(count, solver.UNKNOWN, np.uint8)
    errors = np.zeros((3, 20))
    device.solve_hqq(x, "F32", (64, 1), 64, 15, True, 1024, found, errors)
    assert errors.all()
    assert (found[2] <= 20).all()
    late = np.flatnonzero(found[2] > 3)
    assert 0 < late.size < count
    before = [each.copy() for each in found]
    device.solve_hqq(x, "F32", (64, 1), 64, 15, True, 1024, found, np.zeros((3, 3)))
    early = np.setdiff1d(np.arange(count), late)
    for one, other in zip(found, before, strict=True):
        assert np.array_equal(one[early], other[early])
    assert (found[2][late] <= 3).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_device_refuses_what_ends_hqqs_search(value: float, device: Kernels) -> None:
    values = made("normal")
    values[5, 5] = value
    for kernels in (CpuKernels(), device):
        with Crew(1) as crew, pytest.raises(VerifyFailed, match="HQQ's search, which ends by the error of all weights"):
            encode(Hqq(4), weights(values, "F32"), ThreadedWork(kernels, crew, threading.Event()))


@pytest.mark.parametrize("name", SEARCHED_ON_DEVICE)
def test_weights_that_a_gate_refuses_are_counted(name: str, device: Kernels) -> None:
    values = made("normal")
    values[5, 5], values[6, 7] = np.nan, np.inf
    (_, ours), (_, theirs) = both(Ggml(name), values, "F32", device)
    assert ours.nonfinite == theirs.nonfinite == 2


def test_the_types_that_a_device_searches_are_those_that_it_has() -> None:
    pytest.importorskip("torch")
    from loaders.quantization.kernels.device.decode import BLOCKS
    from loaders.quantization.kernels.device.k_quants import ENCODERS

    assert set(SEARCHED_ON_DEVICE) == set(ENCODERS) <= set(BLOCKS)
