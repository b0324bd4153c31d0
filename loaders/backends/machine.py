"""The CPUs, memory and files that this process may use, within its affinity and the limits of its container."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
DEVICES = Path("/dev")
# Files of the drivers of NVIDIA's GPUs (also of its small boards, Jetson), of AMD's, and of either under WSL.
GPU_FILES = ("nvidiactl", "nvidia0", "nvhost-gpu", "kfd", "dxg")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """Return how many CPUs this process may use: its affinity, and the quota of its container (cgroup 2 or 1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in _quotas(cgroup):
        if quota > 0 and period > 0:
            count = min(count, max(1, quota // period))
    return count


def _quotas(cgroup: Path) -> list[tuple[int, int]]:
    """Return (quota, period) of a container's CPU time, in microseconds.

    A file that is missing or holds something else means that this version of cgroups sets no limit.
    """
    found = []
    with suppress(OSError, ValueError):
        most, within = (cgroup / "cpu.max").read_text().split()
        if most != "max":
            found.append((int(most), int(within)))
    with suppress(OSError, ValueError):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota, period = (int((cgroup / "cpu" / name).read_text()) for name in names)
        found.append((quota, period))
    return found


def has_avx512_bf16() -> bool:
    """Whether the CPU has the bfloat16 instructions of AVX-512, for which some engines have kernels of their own."""
    import llvmlite.binding as llvm

    with suppress(RuntimeError):  # LLVM cannot tell the features of every platform
        return bool(llvm.get_host_cpu_features().get("avx512bf16"))
    return False


def may_have_gpu(devices: Path = DEVICES) -> bool:
    """Whether torch or mlx could find a GPU here. False is certain, and known without importing them.

    torch takes a second to import, and most jobs need it for nothing else. Other systems than Linux have no such files,
    and may always have a GPU.
    """
    if sys.platform != "linux":
        return True
    return any((devices / name).exists() for name in GPU_FILES)


def total_memory() -> int:
    """Return the bytes of memory: the machine's, or the container's limit if that is less."""
    return min([_physical_memory(), *(limit for limit, _ in _limits())])


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Return the bytes that can be taken without evicting what cannot be read again: page cache counts as free."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    with suppress(OSError):  # only Linux has /proc; elsewhere free pages, without the cache, are what is known
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return max(0, min([free or total_memory(), *(limit - used for limit, used in _limits())]))


def _limits(cgroup: Path = CGROUP) -> list[tuple[int, int]]:
    """Return a container's limit of memory, and how much of it is used by what cannot be read again.

    Of cgroup 2 and cgroup 1, the one whose files are missing is passed over, as is the limit "max".
    """
    found = []
    for folder, limit, used, cache in (
        (cgroup, "memory.max", "memory.current", "file"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ):
        with suppress(OSError, ValueError):
            most = int((folder / limit).read_text())
            cached = [ln for ln in (folder / "memory.stat").read_text().splitlines() if ln.startswith(f"{cache} ")]
            found.append((most, int((folder / used).read_text()) - (int(cached[0].split()[1]) if cached else 0)))
    return found


def is_contained() -> bool:
    """Whether this is a container of limited memory, or a pod of Kubernetes, whose cgroup counts nothing else."""
    # Without a limit, cgroup 1 gives a number that no machine reaches.
    is_limited = any(most < _physical_memory() for most, _ in _limits())
    return is_limited or "KUBERNETES_SERVICE_HOST" in os.environ


def max_open_files() -> int:
    """Raise this process's limit of open files to the hard limit, and return it; the old one if that is refused."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (ValueError, OSError):  # some systems and containers allow less than the hard limit says
            return soft
    return wanted


def disk_bytes_fetched() -> int | None:
    """Return the bytes that the kernel has fetched from disks for this process; None where it does not tell."""
    try:
        rows = Path("/proc/self/io").read_text().splitlines()
    except OSError:  # only Linux has the file, and not in every container
        return None
    return next((int(row.split()[1]) for row in rows if row.startswith("read_bytes:")), None)
