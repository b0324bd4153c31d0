"""Where the arithmetic of encoders runs."""

from __future__ import annotations

from loaders.errors import BadSpec
from loaders.quantization.kernels import Kernels
from loaders.quantization.kernels.cpu import CpuKernels

DEVICES = ("cpu", "cuda", "mps")


def kernels_of(backend: str) -> Kernels:
    """The kernels of a backend, by its name in conf/backend/.

    Raises:
        BadSpec: this machine has no such device, or torch is not installed.
    """
    if backend == "cpu":
        return CpuKernels()
    if backend not in DEVICES:
        raise BadSpec(f"backend: unknown {backend!r}; known: {', '.join(DEVICES)}")
    try:
        from loaders.quantization.kernels.device import DeviceKernels
    except ImportError as error:
        raise BadSpec(f"backend={backend}: it needs torch ({error}): pip install torch") from error
    return DeviceKernels(backend)
