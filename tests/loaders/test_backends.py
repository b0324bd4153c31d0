"""Backends: what they say of the machine, how many threads they begin with, dtypes they cannot hold, shared GPUs."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loaders import backends
from loaders.backends import Leases, arrays, backend, devices, machine
from loaders.backends.devices import Backend
from loaders.backends.threads import ThreadedWork
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec
from loaders.quantization.kernels.mlx_device import MlxCoder
from loaders.quantization.scheme import Scheme
from loaders.quantization.schemes.mlx_affine import BITS, GROUP_SIZES, MlxAffine
from loaders.quantization.schemes.mlx_float import SETTINGS, MlxFloat
from loaders.specs import WeightSpec
from tests.loaders.test_schemes import MemorySink, MemoryView
from tests.making import weights

GB = 1 << 30


def gpu(total: int) -> Backend:
    return Backend("cuda", ("cuda:0",), "a GPU", total, total)


def test_the_cpu_says_what_it_may_use() -> None:
    found = backend("cpu")
    assert (found.name, found.device) == ("cpu", "cpu")
    assert 0 < found.free_bytes <= found.total_bytes
    assert machine.usable_cpus() >= 1


def test_quotas_of_containers_count(tmp_path: Path) -> None:
    assert machine.usable_cpus(tmp_path) >= 1
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert machine.usable_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    free = machine.usable_cpus(tmp_path)
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    assert machine.usable_cpus(tmp_path) == 1 <= free


def test_limits_of_containers_leave_out_what_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 100\nfile 600\n")
    assert machine._limits(tmp_path) == [(1000, 100)]
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._limits(tmp_path) == []


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
    monkeypatch.setattr(devices, "_library", {"torch": torch, "mlx.core": mlx}.get)
    assert devices.best() == wanted


@pytest.mark.engine
def test_devices_that_are_not_there_are_refused() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        for call in (lambda: backend("cuda"), lambda: arrays.placer("cuda:1"), lambda: backends.devices_of("cuda")):
            with pytest.raises(BadSpec, match="finds no such device here; use backend=cpu"):
                call()
    with pytest.raises(BadSpec, match="backend: unknown 'tpu'; known: cpu, cuda, mps, mlx, auto"):
        backend("tpu")
    with pytest.raises(BadSpec, match="device: unknown 'gpu'"):
        arrays.placer("gpu")


# --- dtypes


def test_mps_gets_float16_for_bfloat16_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    told = arrays.Told("mps")
    with caplog.at_level(logging.WARNING, "weightmill"):
        for _ in range(3):
            assert told.dtype(DTYPES["BF16"]).name == "F16"
    assert [r.message for r in caplog.records] == ["device=mps: it has no bfloat16; weights become float16"]
    assert told.dtype(DTYPES["F64"]).name == "F32"
    assert told.dtype(DTYPES["F16"]).name == "F16"
    with pytest.raises(BadSpec, match="device=mps: it has no float8_e4m3fn; load to device=cpu"):
        told.dtype(DTYPES["F8_E4M3"])
    assert arrays.allowed_dtype("cuda", DTYPES["BF16"]).name == "BF16"


@pytest.mark.parametrize(
    ("dtype", "shape", "wanted"),
    [
        ("BF16", (3, 4), (3, 4)),
        ("Q4_K", (2, 512), (2, 288)),
        ("F4", (2, 6), (2, 3)),
        ("F4", (2, 3), (3,)),
        ("F6_E2M3", (2, 8), (2, 6)),
    ],
)
def test_numbers_of_less_than_a_byte_are_rows_of_bytes(dtype: str, shape: Any, wanted: Any) -> None:
    assert arrays.storage_shape(DTYPES[dtype], shape) == wanted
    spec = WeightSpec("w", DTYPES[dtype], shape, "f", 0, DTYPES[dtype].size(shape))
    assert arrays.as_numpy(np.zeros(spec.size, np.uint8), spec).shape == wanted


@pytest.mark.engine
def test_crooked_and_read_only_memory_is_copied_for_torch() -> None:
    torch = pytest.importorskip("torch")
    memory = np.arange(17, dtype=np.uint8)
    spec = WeightSpec("w", DTYPES["F32"], (4,), "f", 0, 16)
    wanted = memory[1:].copy().view(np.float32)
    assert torch.equal(arrays.as_torch(memory[1:], spec), torch.from_numpy(wanted))
    memory.flags.writeable = False
    made = arrays.as_torch(memory[:16], spec)
    made.zero_()
    assert memory[1] == 1


# --- quantizing on a device


def encoded(scheme: Scheme, kernels: Any, view: Any, threads: int = 2) -> dict[str, bytes]:
    with ThreadPoolExecutor(threads) as pool:
        sink = MemorySink(scheme, view.spec)
        scheme.encode(view, sink, ThreadedWork(kernels, pool, threading.Event()))
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
