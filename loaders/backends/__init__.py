"""Backends: the devices on which encoders compute and to which weights are loaded: cpu, cuda, mps, mlx."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from loaders.backends.devices import NAMES, OTHER_BYTES, Backend, backend, best
from loaders.errors import BadSpec
from loaders.missing import needed_for
from loaders.near_misses import near
from loaders.quantization.kernels import Kernels
from loaders.quantization.scheme import Scheme, searched_on

__all__ = [
    "DEVICES", "Backend", "backend", "best", "check_backend", "devices_of", "encoded_on", "kernels_of",
    "leased_kernels", "may_differ", "offered",
]  # fmt: skip

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
        raise BadSpec(f"backend: unknown {backend!r}{near(backend, DEVICES)}; known: {', '.join(DEVICES)}")
    if backend == "mlx":
        from loaders.quantization.kernels.mlx_device import MlxKernels

        return MlxKernels()
    with needed_for(f"backend={backend}"):
        from loaders.quantization.kernels.torch_device import DeviceKernels
    return DeviceKernels(backend)


def check_backend(backend: str) -> None:
    """Check that this machine has a backend. It always has the CPU, whose kernels are not imported for that.

    Raises:
        BadSpec: it has no such device, or its library is not installed.
    """
    if backend != "cpu":
        kernels_of(backend)


def offered(scheme: Scheme) -> tuple[str, ...]:
    """Return the backends that a job may ask for to encode by a scheme."""
    return (*scheme.backends, *searched_on(scheme))


def encoded_on(scheme: Scheme, backend: str, *, searches: bool) -> str:
    """Return where work on a backend encodes by a scheme: there, or else on the CPU.

    `searches` says whether it may find other codes than the CPU does: only if the backend was asked for by its name.
    """
    found = offered(scheme) if searches else scheme.backends
    return backend if backend in found else "cpu"


def may_differ(schemes: Iterable[Scheme], backend: str) -> bool:
    """Whether a backend that was asked for may store other bytes than the CPU by any of some schemes."""
    return backend in OTHER_BYTES or any(backend in searched_on(scheme) for scheme in schemes)


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
