"""Files of a folder: what they are, where they lie, what of them is in memory already."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np

from loaders.errors import io_errors

NETWORK = ("nfs", "lustre", "ceph", "cifs", "smb", "gpfs", "beegfs", "glusterfs", "9p", "afs", "orangefs", "fuse.")
OBJECT_FUSE = (
    "s3fs",
    "gcsfuse",
    "goofys",
    "geesefs",
    "mountpoint-s3",
    "rclone",
    "blobfuse",
    "juicefs",
    "ossfs",
    "hf-mount",
)
MEMORY = ("tmpfs", "ramfs", "hugetlbfs")
CACHE_WINDOW = 1 << 20  # bytes looked at in each of so many places of a file
CACHE_WINDOWS = 16
CACHESTAT = 451  # the number of the system call, on every architecture: Linux 6.5
LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.lxcfs", "fuse.portal")


def filesystem(path: Path) -> str:
    """The type of the filesystem a path lies on ("ext4", "nfs4"); "unknown" where the system does not tell."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    real = os.path.realpath(path)
    best, kind = "", "unknown"
    for line in mounts:
        _, point, name = line.split(" ")[:3]
        point = point.encode().decode("unicode_escape")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


def is_network(kind: str) -> bool:
    """Whether a filesystem type is served by another machine, where a map of a file is slow."""
    return kind.startswith(NETWORK) and kind not in LOCAL_FUSE


def medium(path: Path) -> str:
    """What a path lies on: "memory", "local", "rotational" (a turning disk), "network", "object" (a mounted store)."""
    kind = filesystem(path)
    if kind in MEMORY:
        return "memory"
    if kind.startswith("fuse") and kind.removeprefix("fuse.").startswith(OBJECT_FUSE):
        return "object"
    if is_network(kind):
        return "network"
    return "rotational" if _turns(path) else "local"


def _turns(path: Path) -> bool:
    """Whether the kernel says that the block device turns; virtual disks often say so, whatever they are."""
    try:
        device = path.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        folder = Path(f"/sys/dev/block/{number}").resolve()
        queue = next(f / "queue" for f in (folder, folder.parent) if (f / "queue" / "rotational").exists())
        is_virtual = "virtio" in str(folder) or "/virtual/" in str(folder)
        return (queue / "rotational").read_text().strip() == "1" and not is_virtual
    except (OSError, StopIteration):
        return False


def drop_cached(path: Path) -> float | None:
    """Ask the kernel to forget a file's pages; the share that stayed. None where the system does not tell.

    Pages that were not written yet, or that another process maps, stay.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    with io_errors("dropping from the page cache", path), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(path)


def cached_share(path: Path) -> float | None:
    """The share of a file's pages that are in the page cache: of small ones exactly, else by windows from its start to
    its end. None where the system does not tell.
    """
    size = path.stat().st_size
    if not sys.platform.startswith("linux") or size == 0:
        return None
    window = min(size, CACHE_WINDOW)
    places = ((size - window) * index // (CACHE_WINDOWS - 1) for index in range(CACHE_WINDOWS))
    starts = sorted({at // mmap.PAGESIZE * mmap.PAGESIZE for at in places})
    ranges = [(0, size)] if size <= CACHE_WINDOW * CACHE_WINDOWS else [(at, min(window, size - at)) for at in starts]
    with path.open("rb") as file:
        found = _counted(file.fileno(), ranges)
        return _resident(file.fileno(), ranges) if found is None else found


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _counted(descriptor: int, ranges: list[tuple[int, int]]) -> float | None:
    """By cachestat, which knows what is cached; None where the kernel has none, or does not tell this user."""
    pages = cached = 0
    counts = np.empty(5, np.uint64)  # cached, dirty, being written, evicted, recently evicted
    for start, size in ranges:
        asked = np.array([start, size], np.uint64)
        args = [
            ctypes.c_long(CACHESTAT),
            ctypes.c_int(descriptor),
            *(ctypes.c_void_p(a.ctypes.data) for a in (asked, counts)),
        ]
        if _libc().syscall(*args, ctypes.c_uint(0)):
            return None
        pages += -(-size // mmap.PAGESIZE)
        cached += int(counts[0])
    return min(1.0, cached / pages)


def _resident(descriptor: int, ranges: list[tuple[int, int]]) -> float | None:
    """By mincore, of a map."""
    pages = cached = 0
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as view:
        anchor = np.frombuffer(view, np.uint8)  # only its address is used
        for start, size in ranges:
            seen = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
            where = ctypes.c_void_p(anchor.ctypes.data + start)
            if _libc().mincore(where, ctypes.c_size_t(size), ctypes.c_void_p(seen.ctypes.data)):
                return None
            pages += seen.size
            cached += int((seen & 1).sum())
        del anchor
    return cached / pages


def free_bytes(path: Path) -> int:
    """Free space where `path` lies or would be made."""
    return shutil.disk_usage(_nearest(path)).free


def device_of(path: Path) -> int:
    """The number of the filesystem that `path` lies on, or would be made on."""
    return _nearest(path).stat().st_dev


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
