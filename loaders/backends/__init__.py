"""Where the arithmetic of encoders runs, and where weights go: cpu, cuda, mps, mlx."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from loaders.backends.devices import NAMES, Backend, backend, best
from loaders.errors import BadSpec
from loaders.quantization.kernels import Kernels

__all__ = ["DEVICES", "Backend", "backend", "best", "devices_of", "kernels_of", "leased_kernels"]

DEVICES = NAMES


def kernels_of(backend: str) -> Kernels:
    """The kernels of a backend, by its name in conf/backend/, or of one device of several ("cuda:1").

    Raises:
        BadSpec: this machine has no such device, or its library is not installed.
    """
    if backend == "cpu":
        from loaders.quantization.kernels.cpu import CpuKernels  # numba is slow to import; who only loads needs none

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


class Leases:
    """Which of several devices are in use, by how many units."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def least_used(self, devices: tuple[str, ...]) -> Iterator[str]:
        """One of the devices, that which fewest hold; the first of several such."""
        with self._lock:
            device = min(devices, key=lambda name: self._held.get(name, 0))
            self._held[device] = self._held.get(device, 0) + 1
        try:
            yield device
        finally:
            with self._lock:
                self._held[device] -= 1


def devices_of(name: str) -> tuple[str, ...]:
    """A backend's devices by name: every GPU of "cuda", else the one.

    Raises:
        BadSpec: this machine has none.
    """
    return backend(name).devices if name == "cuda" else (name,)


_LEASES = Leases()  # of this process: units on its threads share the machine's devices


@contextmanager
def leased_kernels(name: str) -> Iterator[Kernels]:
    """The kernels of a backend; of several GPUs, those of the one that fewest units of this process use."""
    with _LEASES.least_used(devices_of(name)) as device:
        yield kernels_of(device)
