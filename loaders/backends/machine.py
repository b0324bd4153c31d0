"""What this machine lets the process use: CPUs and memory, within its affinity and the limits of its container."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """The CPUs this process may use: its affinity, and the quota of its container (cgroup 2 or 1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in _quotas(cgroup):
        if quota > 0 and period > 0:
            count = min(count, max(1, quota // period))
    return count


def _quotas(cgroup: Path) -> list[tuple[int, int]]:
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


def total_memory() -> int:
    """Bytes of memory: the machine's, or the container's limit where that is less."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """Bytes that can be taken without pushing anything out that cannot be read again."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return max(0, min([free or total_memory(), *(limit - used for limit, used in _limits())]))


def _limits(cgroup: Path = CGROUP) -> list[tuple[int, int]]:
    """A container's limit of memory, and how much of it is used by what cannot be read again."""
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


def max_open_files() -> int:
    """How many files this process may open, once it has asked for all it can get."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (ValueError, OSError):
            return soft
    return wanted


def disk_bytes_fetched() -> int | None:
    """What the kernel has fetched from disks for this process."""
    try:
        rows = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(row.split()[1]) for row in rows if row.startswith("read_bytes:")), None)
