"""Devices: which ones there are, their memory, and how a strategy should feed them.

Worker counts are starting points; the multithread strategy then measures (strategies/reading/thread_tuning.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loaders.backends import machine
from loaders.errors import BadSpec
from loaders.missing import needed_for
from loaders.near_misses import near

NAMES = ("cpu", "cuda", "mps", "mlx")
# Devices on which a scheme may get other bytes than on the CPU: torch's MPS flushes subnormal numbers.
OTHER_BYTES = ("mps",)
# A rule of thumb: a GPU with more memory sits in a machine that can read faster. 1 worker for 10 GiB, 8 for 80 GiB.
GPU_BYTES_A_WORKER = 10 << 30
MOST_GPU_WORKERS = 8  # what the largest GPUs get by that rule
APPLE_WORKERS = 4  # a rule of thumb: with unified memory, its controllers limit how many copies help
# The least and the most threads that keep a medium busy. Threads that read another machine's disks mostly wait; more
# than two on a rotating disk make it seek.
FED_BY = {"memory": (1, 8), "local": (2, 8), "rotational": (1, 2), "network": (8, 16), "object": (16, 32)}
OWN_THREADS = ("fastsafetensors", "runai")  # strategies whose libraries have workers of their own
ONE_THREAD = ("lazy", "read", "unified_memory")


@dataclass(frozen=True, slots=True)
class Backend:
    """A device of this machine. `devices` names each of several ("cuda:0", "cuda:1"); memory is that of the first."""

    name: str
    devices: tuple[str, ...]
    description: str
    total_bytes: int
    free_bytes: int

    @property
    def device(self) -> str:
        """The name of the device that loaders take."""
        return self.devices[0]

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies that load weights onto it, the best first; strategy=auto looks at the files as well."""
        if self.name == "cuda":
            return ("fastsafetensors", "multithread", "streaming", "lazy")
        if self.name in ("mps", "mlx"):
            return ("unified_memory", "multithread", "streaming")
        return ("lazy", "multithread", "streaming", "read")

    def workers(self, strategy: str, medium: str = "local") -> int:
        """Return the most threads to read with, from a medium as loaders/storage names it ("local", "network", ...)."""
        if strategy in OWN_THREADS or strategy in ONE_THREAD:
            return 1
        least, most = FED_BY[medium]
        if self.name == "cuda":
            by_memory = max(1, min(MOST_GPU_WORKERS, self.total_bytes // GPU_BYTES_A_WORKER))
            return min(by_memory, most) if strategy == "multithread" else min(by_memory, most, 4)
        if self.name in ("mps", "mlx"):
            return min(APPLE_WORKERS, most)
        return min(most, max(least, machine.usable_cpus()))


def backend(name: str = "auto") -> Backend:
    """Return a device by its name: cpu, cuda, mps, mlx; auto is a GPU if there is one.

    Raises:
        BadSpec: this machine has no such device, or its library is not installed.
    """
    if name == "auto":
        return backend(best())
    if name == "cpu":
        description = f"{machine.usable_cpus()} CPUs"
        return Backend("cpu", ("cpu",), description, machine.total_memory(), machine.free_memory())
    if name == "cuda":
        return _cuda()
    if name == "mps":
        torch, _ = torch_device("mps")
        total = int(torch.mps.recommended_max_memory())
        used = int(torch.mps.driver_allocated_memory())
        return Backend("mps", ("mps",), "an Apple GPU, through torch", total, max(0, total - used))
    if name == "mlx":
        return _mlx()
    raise BadSpec(f"backend: unknown {name!r}{near(name, NAMES)}; known: {', '.join(NAMES)}, auto")


def fed(device: str | None) -> Backend:
    """Return the backend of a device as loaders name it ("cuda:1", "mlx", None for numpy's arrays)."""
    kind = (device or "cpu").partition(":")[0]
    return backend(kind if kind in NAMES else "cpu")


def best() -> str:
    """Return the name of this machine's fastest device: a GPU of torch's, else Apple's by mlx, else the CPU."""
    if not machine.may_have_gpu():
        return "cpu"
    torch = _library("torch")
    if torch is not None:
        if torch.cuda.is_available():
            return "cuda"
        if torch.backends.mps.is_available():
            return "mps"
    mlx = _library("mlx.core")
    return "mlx" if mlx is not None and mlx.metal.is_available() else "cpu"


def _cuda() -> Backend:
    torch, _ = torch_device("cuda")
    names = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    free, total = torch.cuda.mem_get_info(0)
    return Backend("cuda", names, f"{len(names)} x {torch.cuda.get_device_name(0)}", int(total), int(free))


def _mlx() -> Backend:
    mx = mlx_core()
    if mx.metal.is_available():
        total = int(mx.device_info()["max_recommended_working_set_size"])
        free = max(0, total - int(mx.get_active_memory()))
        return Backend("mlx", ("mlx",), f"{mx.device_info()['device_name']}, through mlx", total, free)
    memory = machine.total_memory(), machine.free_memory()
    return Backend("mlx", ("mlx",), "mlx on the CPU", *memory)


def device_name(device: Any) -> str | None:
    """Return the name of a device, which may be torch's own object for it. None stands for arrays of numpy's.

    Capitals do not matter, and the one CPU may have its number: "CPU" and "cpu:0" are "cpu".

    Raises:
        BadSpec: it is neither.
    """
    if device is None:
        return None
    if isinstance(device, str):
        name = device.lower()
        return "cpu" if name == "cpu:0" else name
    if type(device).__module__ == "torch":
        return device_name(str(device))
    raise BadSpec(f"device: expected a name as cpu or cuda:0, a torch.device or None, found {str(device)[:100]!r}")


def torch_device(device: str) -> tuple[Any, Any]:
    """Return torch, and its device of a name ("cpu", "cuda", "cuda:1", "mps").

    Raises:
        BadSpec: torch is not installed, or finds no such device.
    """
    device = device_name(device) or "cpu"
    with needed_for(f"backend={device}"):
        import torch
    kind, _, index = device.partition(":")
    is_there: dict[str, Callable[[], bool]] = {
        "cpu": lambda: not index,
        "cuda": lambda: torch.cuda.is_available() and (not index or int(index) < torch.cuda.device_count()),
        "mps": torch.backends.mps.is_available,
        "meta": lambda: True,
    }
    if kind not in is_there or (index and not index.isdecimal()):
        hint = near(device, ("cpu", "cuda", "mps", "mlx"))
        raise BadSpec(f"device: unknown {device!r}{hint}; known: cpu, cuda, cuda:N, mps, mlx")
    if not is_there[kind]():
        raise BadSpec(f"backend={device}: torch {torch.__version__} finds no such device here; use backend=cpu")
    return torch, torch.device(device)


def mlx_core() -> Any:
    """Return mlx.core.

    Raises:
        BadSpec: it is not installed, or does not work here.
    """
    with needed_for("backend=mlx"):
        import mlx.core as mx
    return mx


def _library(name: str) -> Any:
    """Import a library, or return None if it is not installed or does not work here."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        return None
