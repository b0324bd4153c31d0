"""Backends: the devices on which encoders compute and to which weights are loaded: cpu, cuda, mps, mlx."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from loaders.backends.devices import NAMES, Backend, backend, best
from loaders.errors import BadSpec
from loaders.quantization.kernels import Kernels

__all__ = ["DEVICES", "Backend", "backend", "best", "check_backend", "devices_of", "kernels_of", "leased_kernels"]

DEVICES = NAMES


def kernels_of(backend: str) -> Kernels:
    """Return the kernels of a backend by its name in conf/backend/, or of one of several devices ("cuda:1").

    Raises:
        BadSpec: this machine has no such device, or its library is not installed.
    """
    if backend == "cpu":
        from loaders.quantization.kernels.cpu import CpuKernels  # numba is slow to import, and only loading needs none

        return CpuKernels()
    if backend.partition(":")[0] not in DEVICES:
        raise BadSpec(f"backend: unknown {backend!r}; known: {', '.join(DEVICES)}")
    if backend == "mlx":
        from loaders.quantization.kernels.mlx_device import MlxKernels

        return MlxKernels()
    try:
        from loaders.quantization.kernels.torch_device import DeviceKernels
    except ImportError as error:
        raise BadSpec(f"backend={backend}: it needs torch ({error}): pip install torch") from error
    return DeviceKernels(backend)


def check_backend(backend: str) -> None:
    """Check that this machine has a backend. It always has the CPU, whose kernels are not imported for that.

    Raises:
        BadSpec: it has no such device, or its library is not installed.
    """
    if backend != "cpu":
        kernels_of(backend)


class Leases:
    """A count of the units that use each of several devices."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def least_used(self, devices: tuple[str, ...]) -> Iterator[str]:
        """Hold the device that fewest units hold, the first of equals, while the context is open."""
        with self._lock:
            device = min(devices, key=lambda name: self._held.get(name, 0))
            self._held[device] = self._held.get(device, 0) + 1
        try:
            yield device
        finally:
            with self._lock:
                self._held[device] -= 1


def devices_of(name: str) -> tuple[str, ...]:
    """Return the names of a backend's devices: every GPU of "cuda", or the one device of another.

    Raises:
        BadSpec: this machine has none.
    """
    return backend(name).devices if name == "cuda" else (name,)


_LEASES = Leases()  # one for the process, since the units on its threads share the machine's devices


@contextmanager
def leased_kernels(name: str) -> Iterator[Kernels]:
    """Give the kernels of a backend; of several GPUs, those of the one that fewest units of this process use."""
    with _LEASES.least_used(devices_of(name)) as device:
        yield kernels_of(device)
