"""Devices: which there are, how many threads feed them, which is taken, what they encode."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loaders import backends
from loaders.backends import Leases, arrays, backend, devices, machine
from loaders.backends.devices import Backend
from loaders.backends.threads import Crew, ThreadedWork
from loaders.errors import BadSpec
from loaders.quantization.kernels.mlx_device import MlxCoder
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.mlx_affine import BITS, GROUP_SIZES, MlxAffine
from loaders.quantization.schemes.mlx_float import SETTINGS, MlxFloat
from tests.encoding import MemorySink, MemoryView
from tests.making import weights

GB = 1 << 30


def gpu(total: int) -> Backend:
    return Backend("cuda", ("cuda:0",), "a GPU", total, total)


@pytest.mark.parametrize(
    ("total", "strategy", "wanted"),
    [
        (8 * GB, "multithread", 1),
        (24 * GB, "multithread", 2),
        (80 * GB, "multithread", 8),
        (141 * GB, "multithread", 8),
        (141 * GB, "streaming", 4),
        (141 * GB, "fastsafetensors", 1),  # it brings its own
        (141 * GB, "lazy", 1),
    ],
)
def test_a_gpu_is_fed_by_one_to_eight_threads(total: int, strategy: str, wanted: int) -> None:
    assert gpu(total).workers(strategy) == wanted


def test_unified_memory_is_fed_by_four() -> None:
    for name in ("mps", "mlx"):
        found = Backend(name, (name,), "", 16 * GB, 8 * GB)
        assert found.workers("multithread") == found.workers("streaming") == 4
        assert found.strategies[0] == "unified_memory"


def test_the_cpu_is_fed_by_its_cores_and_by_what_its_storage_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    found = backend("cpu")
    for cpus, medium, wanted in (
        (1, "local", 2), (4, "local", 4), (64, "local", 8), (64, "rotational", 2), (2, "network", 8),
        (64, "network", 16), (2, "object", 16), (4, "memory", 4),
    ):  # fmt: skip
        monkeypatch.setattr(machine, "usable_cpus", lambda cpus=cpus: cpus)
        assert found.workers("multithread", medium) == wanted, (cpus, medium)


def torch_with(cuda: bool = False, mps: bool = False) -> Any:
    return SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: cuda),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )


def mlx_with(metal: bool) -> Any:
    return SimpleNamespace(metal=SimpleNamespace(is_available=lambda: metal))


@pytest.mark.parametrize(
    ("torch", "mlx", "wanted"),
    [
        (torch_with(cuda=True), None, "cuda"),
        (torch_with(mps=True), mlx_with(True), "mps"),
        (torch_with(), mlx_with(True), "mlx"),
        (None, mlx_with(False), "cpu"),
        (None, None, "cpu"),
    ],
)
def test_auto_takes_a_gpu_where_there_is_one(
    torch: Any, mlx: Any, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "may_have_gpu", lambda: True)
    monkeypatch.setattr(devices, "_library", {"torch": torch, "mlx.core": mlx}.get)
    assert devices.best() == wanted


@pytest.mark.engine
def test_devices_that_are_not_there_are_refused() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        for call in (lambda: backend("cuda"), lambda: arrays.placer("cuda:1"), lambda: backends.devices_of("cuda")):
            with pytest.raises(BadSpec, match="finds no such device here; use backend=cpu"):
                call()
    with pytest.raises(BadSpec, match="backend: unknown 'tpu'; did you mean 'cpu'"):
        backend("tpu")
    with pytest.raises(BadSpec, match="device: unknown 'gpu'"):
        arrays.placer("gpu")


# --- quantizing on a device


def encoded(scheme: Scheme, kernels: Any, view: Any, threads: int = 2) -> dict[str, bytes]:
    with Crew(threads) as crew:
        sink = MemorySink(scheme, view.spec)
        scheme.encode(view, sink, ThreadedWork(kernels, crew, threading.Event()))
    return sink.as_bytes()


@pytest.mark.engine
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize(
    "scheme",
    [*(MlxAffine(bits, group) for bits in BITS for group in GROUP_SIZES if group == 64 or bits == 4),
     *(MlxFloat(mode) for mode in SETTINGS)],
    ids=str,
)  # fmt: skip
def test_mlx_quantizes_on_its_device_to_the_same_bytes(scheme: Scheme, dtype: str) -> None:
    pytest.importorskip("mlx.core")
    kernels = backends.kernels_of("mlx")
    assert isinstance(kernels, MlxCoder)
    values = np.random.default_rng(3).standard_normal((6, 256)).astype(np.float32) * 0.05
    values[0], values[1, ::2], values[2] = 0, -1.5, -np.abs(values[2])
    view = MemoryView(weights(values, dtype))
    assert encoded(scheme, kernels, view) == encoded(scheme, backends.kernels_of("cpu"), view)


@pytest.mark.engine
def test_a_device_of_other_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core")
    from loaders.quantization.kernels import mlx_device

    monkeypatch.setattr(mlx_device, "_gives_the_same_bytes", lambda: False)
    with pytest.raises(BadSpec, match="backend=mlx: .* rounds otherwise than MLX on a CPU"):
        backends.kernels_of("mlx")


def test_units_side_by_side_get_the_gpu_that_fewest_use() -> None:
    leases, names = Leases(), ("cuda:0", "cuda:1", "cuda:2")
    with leases.least_used(names) as one, leases.least_used(names) as two:
        assert (one, two) == ("cuda:0", "cuda:1")
        with leases.least_used(names) as three, leases.least_used(names) as four:
            assert (three, four) == ("cuda:2", "cuda:0")
        with leases.least_used(names) as again:
            assert again == "cuda:2"
    with pytest.raises(RuntimeError, match="broken"), leases.least_used(names):
        raise RuntimeError("broken")
    with leases.least_used(names) as free:
        assert free == "cuda:0"


@pytest.mark.gpu
@pytest.mark.engine
def test_every_gpu_of_the_machine_is_used() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    found = backend("cuda")
    assert len(found.devices) == torch.cuda.device_count()
    assert 0 < found.free_bytes <= found.total_bytes
    assert 1 <= found.workers("multithread") <= 8
    held = [backends.leased_kernels("cuda") for _ in found.devices]
    used = {str(lease.__enter__()._device) for lease in held}  # type: ignore[attr-defined]
    for lease in held:
        lease.__exit__(None, None, None)
    assert used == set(found.devices)
