"""Facts about local files: the kind of filesystem and disk, the share in the page cache, the free space."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np

from loaders.errors import io_errors

# Prefixes of the filesystem types in /proc/mounts. A FUSE filesystem is taken for a network one, since most are; those
# in OBJECT_FUSE mount an object store, and those in LOCAL_FUSE (below) are local.
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
# The page cache is sampled by windows of 64 KiB, from one end of a range to the other, one for each 4 MiB and at most
# 16: reading stops and evicts in long runs, and the answer only has to tell what is warm from what is cold. To count
# all pages takes 8 microseconds a MiB, a fifth of the time in which they are summed.
CACHE_WINDOW = 64 << 10
CACHE_STEP = 4 << 20
CACHE_WINDOWS = 16
CACHESTAT = 451  # the number of the system call cachestat, the same on every architecture; Linux 6.5 and later
LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.lxcfs", "fuse.portal")


def filesystem(path: Path) -> str:
    """Return the type of the filesystem that a path is on ("ext4", "nfs4"); "unknown" without /proc/mounts."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:  # macOS has no /proc, and some sandboxes hide it.
        return "unknown"
    real = os.path.realpath(path)
    best, kind = "", "unknown"
    for line in mounts:
        _, point, name = line.split(" ")[:3]
        # The kernel writes a space as \040.
        point = point.encode().decode("unicode_escape")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        # The longest mount point that contains the path counts; of equal ones the later, which is mounted over it.
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


def is_network(kind: str) -> bool:
    """Whether a filesystem type is served by another machine, where page faults of a memory map are slow."""
    return kind.startswith(NETWORK) and kind not in LOCAL_FUSE


def medium(path: Path) -> str:
    """Return what a path is stored on: "memory", "local" (an SSD or unknown), "rotational" (a hard disk), "network", or
    "object" (an object store mounted by FUSE).
    """
    kind = filesystem(path)
    if kind in MEMORY:
        return "memory"
    if kind.startswith("fuse") and kind.removeprefix("fuse.").startswith(OBJECT_FUSE):
        return "object"
    if is_network(kind):
        return "network"
    return "rotational" if _turns(path) else "local"


def _turns(path: Path) -> bool:
    """Whether the kernel says that the block device is rotational. Virtual disks, which often say so, do not count."""
    try:
        device = path.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        folder = Path(f"/sys/dev/block/{number}").resolve()
        # A partition has no queue of its own; its disk, one folder up, has.
        queue = next(f / "queue" for f in (folder, folder.parent) if (f / "queue" / "rotational").exists())
        is_virtual = "virtio" in str(folder) or "/virtual/" in str(folder)
        return (queue / "rotational").read_text().strip() == "1" and not is_virtual
    # No sysfs, or a filesystem without a block device (overlay, btrfs, zfs).
    except (OSError, StopIteration):
        return False


def drop_cached(path: Path) -> float | None:
    """Ask the kernel to drop a file from the page cache; returns the share (0 to 1) that stayed, None if unknown.

    Pages that are dirty, or that another process maps, stay.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    with io_errors("dropping from the page cache", path), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(path)


def fetch(descriptor: int, start: int, stop: int) -> int | None:
    """Bring bytes [start, stop) of an open file into the page cache; returns the end of those that the file has.

    The kernel is asked for all of them at once, and then waited for: Linux "sends" them to /dev/null, which copies
    none. Without the first step its own read-ahead would fetch them, in large folios, at a tenth of the CPU; but those
    take memory that a virtual machine gave back to its host, where each first touch costs more than it saved. None
    means that the system or the filesystem cannot: then bytes must be read, and thrown away.

    Raises:
        OSError: they cannot be read.
    """
    if not sys.platform.startswith("linux"):
        return None
    at = start
    try:
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
        while at < stop and (count := os.sendfile(_nowhere(), descriptor, at, stop - at)):
            at += count
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            return None
        raise
    return at


@cache
def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)


def cached_share(path: Path) -> float | None:
    """Return the share (0 to 1) of a file's pages that are in the page cache; None if the system does not tell.

    Files of up to 4 MiB are counted exactly; of larger ones, windows are sampled.
    """
    with path.open("rb") as file:
        return cached_part(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def cached_part(descriptor: int, start: int, stop: int) -> float | None:
    """Return the share (0 to 1) of bytes [start, stop) of an open file that is in the page cache, as `cached_share`."""
    if not sys.platform.startswith("linux") or start >= stop:
        return None
    ranges = _windows(start, stop)
    found = _counted(descriptor, ranges)
    return _resident(descriptor, ranges) if found is None else found


def _windows(start: int, stop: int) -> list[tuple[int, int]]:
    """Return (start, size) of the windows by which bytes [start, stop) are sampled; the first begins at a page."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    count = min(CACHE_WINDOWS, (stop - first) // CACHE_STEP)
    if count < 1:
        return [(first, stop - first)]
    places = ((stop - first - CACHE_WINDOW) * index // count for index in range(count + 1))
    starts = sorted({first + at // mmap.PAGESIZE * mmap.PAGESIZE for at in places})
    return [(at, min(CACHE_WINDOW + mmap.PAGESIZE, stop - at)) for at in starts]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _counted(descriptor: int, ranges: list[tuple[int, int]]) -> float | None:
    """Return the cached share of ranges by cachestat(2); None if the kernel lacks it, or refuses this user."""
    pages = cached = 0
    counts = np.empty(5, np.uint64)  # cached, dirty, being written, evicted, recently evicted
    for start, size in ranges:
        asked = np.array([start, size], np.uint64)
        # syscall() is variadic: ctypes would pass plain integers as 32 bits, so each argument is given its C type.
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
    """Return the cached share of ranges by mincore(2), for kernels before 6.5; None if it is refused.

    Since Linux 5.2, mincore says that all pages are cached to a user who could not write the file, which is no answer.
    """
    if os.fstat(descriptor).st_uid != os.geteuid() and not os.access(f"/proc/self/fd/{descriptor}", os.W_OK):
        return None
    pages = cached = 0
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as view:
        # ctypes cannot take the address of a read-only map, numpy can. No page of it is touched, which would load it.
        anchor = np.frombuffer(view, np.uint8)
        for start, size in ranges:
            seen = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
            where = ctypes.c_void_p(anchor.ctypes.data + start)
            if _libc().mincore(where, ctypes.c_size_t(size), ctypes.c_void_p(seen.ctypes.data)):
                return None
            pages += seen.size
            cached += int((seen & 1).sum())
        # A map cannot be closed while an array refers to it.
        del anchor
    return cached / pages


def free_bytes(path: Path) -> int:
    """Return the free bytes of the filesystem that `path` is on, or would be created on."""
    return shutil.disk_usage(_nearest(path)).free


def device_of(path: Path) -> int:
    """Return the device number of the filesystem that `path` is on, or would be created on."""
    return _nearest(path).stat().st_dev


def _nearest(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
