"""What a torch device encodes is measured there as the CPU does it: on torch's CPU device, and a GPU if there is."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from loaders.backends import threads
from loaders.backends.threads import Crew, ThreadedWork
from loaders.clock import Clock
from loaders.errors import VerifyFailed
from loaders.quantization.kernels import Kernels
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.quantization.measure import encode_and_measure, measure
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.bitsandbytes_4bit import Bnb4
from loaders.stats import ErrorSums
from tests.encoding import MemorySink, MemoryView
from tests.loaders.quantization.test_device_kernels import SCHEMES, device, every_finite, ordinary
from tests.making import Raw, weights

pytestmark = pytest.mark.engine

__all__ = ["device"]  # a fixture
BY_RANGE = {name: scheme for name, scheme in SCHEMES.items() if not getattr(scheme, "double_quant", False)}


@pytest.fixture(autouse=True)
def _short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "RANGE", 1 << 14)


def measured(
    kernels: Kernels, scheme: Scheme, raw: Raw, kind: type[MemorySink] = MemorySink
) -> tuple[ErrorSums, MemorySink]:
    """The error of weights that are encoded and measured in one trip, and what was stored."""
    view = MemoryView(raw)
    sink = kind(scheme, view.spec)
    with Crew(2) as crew:
        work = ThreadedWork(kernels, crew, threading.Event())
        stored = scheme.stored(view.spec)
        error = encode_and_measure(view, lambda v: v, scheme, stored, sink, work, lambda count: None, Clock())
    return error, sink


def on_cpu(scheme: Scheme, raw: Raw, sink: MemorySink) -> ErrorSums:
    """The error of what was stored, by the CPU's decoder."""
    view = MemoryView(raw)
    with Crew(2) as crew:
        work = ThreadedWork(CpuKernels(), crew, threading.Event())
        return measure(view, scheme, view.spec, sink, work, lambda count: None)


def counted(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the size of every range that the device compares."""
    sizes, compare = [], kernels.compare

    def counting(x: np.ndarray, *rest: Any) -> None:
        compare(x, *rest)
        sizes.append(x.size)

    monkeypatch.setattr(kernels, "compare", counting)
    return sizes


def check_alike(found: ErrorSums, wanted: ErrorSums) -> None:
    """The CPU adds up to 4096 weights in float32, which costs it up to 256 roundings of 2^-24 each: 2e-5."""
    for name in ("error2", "source2", "decoded2", "product"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=2e-5), name
    assert found.max_error == pytest.approx(wanted.max_error, rel=2**-22)
    for name in ("numel", "nonfinite", "nonfinite_decoded", "wrong"):
        assert getattr(found, name) == getattr(wanted, name), name


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("name", BY_RANGE)
def test_a_device_measures_what_the_cpu_does(
    name: str, dtype: str, device: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = weights(ordinary(), "F32" if dtype == "F64" else dtype)
    raw = Raw("F64", raw.data.astype(np.float64)) if dtype == "F64" else raw
    sizes = counted(device, monkeypatch)
    found, sink = measured(device, BY_RANGE[name], raw)
    assert sum(sizes) == raw.data.size
    assert len(sizes) > 1
    check_alike(found, on_cpu(BY_RANGE[name], raw, sink))


@pytest.mark.parametrize("name", BY_RANGE)
def test_ranges_that_a_graph_encodes_are_as_the_first_ones(name: str, device: Kernels) -> None:
    raw = weights(np.concatenate([ordinary() * np.float32(0.5**k) for k in range(8)]), "BF16")
    found, sink = measured(device, BY_RANGE[name], raw)
    wanted, host = measured(CpuKernels(), BY_RANGE[name], raw)
    assert [role for role in host.stored if host.stored[role].tobytes() != sink.stored[role].tobytes()] == []
    check_alike(found, wanted)


def test_what_a_graph_gave_is_kept_until_it_runs_again(device: Any) -> None:
    packed, absmax = np.empty(64, np.uint8), np.empty(2, np.float32)
    arrays = [np.full(128, number, np.float32) for number in range(6)]
    with device.keeping():
        for x in arrays:
            device.encode_fourbit(x, "F32", "nf4", 64, packed, absmax)
        for x in arrays:
            raw = device._transfers.kept(x)
            assert raw is None or raw.cpu().numpy().tobytes() == x.tobytes()
        assert device.keeps(arrays[-1])


@pytest.mark.parametrize("name", BY_RANGE)
def test_a_device_measures_every_finite_value(name: str, device: Kernels) -> None:
    raw = every_finite("F16")
    found, sink = measured(device, BY_RANGE[name], raw)
    check_alike(found, on_cpu(BY_RANGE[name], raw, sink))


@pytest.mark.parametrize("name", ["nf4", "w4a16 128", "mlx 4", "Q8_0", "fp8"])
def test_nan_and_infinities_are_counted_on_a_device(name: str, device: Kernels) -> None:
    values = ordinary()
    values[20, 7], values[21, 100], values[22, 900] = np.nan, np.inf, -np.inf
    raw = weights(values, "F32")
    found, sink = measured(device, BY_RANGE[name], raw)
    assert found.nonfinite == 3
    check_alike(found, on_cpu(BY_RANGE[name], raw, sink))


def test_double_quantization_is_measured_by_the_cpu(device: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, raw = Bnb4("nf4", double_quant=True), weights(ordinary(), "BF16")
    sizes = counted(device, monkeypatch)
    found, sink = measured(device, scheme, raw)
    assert (sizes, found) == ([], on_cpu(scheme, raw, sink))


class Damaging(MemorySink):
    """A sink under whose hands a code changes between the device and the memory."""

    def write(self, role: str, start: int, data: np.ndarray) -> None:
        if role == "weight":
            data.reshape(-1).view(np.uint8)[5] ^= 1
        super().write(role, start, data)


def test_codes_that_came_back_changed_are_noticed(device: Kernels) -> None:
    with pytest.raises(VerifyFailed, match="a copy between them went wrong"):
        measured(device, Bnb4("nf4"), weights(ordinary(), "BF16"), Damaging)


def test_nothing_stays_on_the_device(device: Any) -> None:
    x, packed, absmax = np.ones(128, np.float32), np.empty(64, np.uint8), np.empty(2, np.float32)
    with device.keeping():
        device.encode_fourbit(x, "F32", "nf4", 64, packed, absmax)
        assert device.keeps(x)
        assert not device.keeps(x[:64])
    assert not device.keeps(x)
    device.encode_fourbit(x, "F32", "nf4", 64, packed, absmax)
    assert not device.keeps(x)
