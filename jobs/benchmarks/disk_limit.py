"""Limiting the rate of a process's reads from a disk, by a Linux control group of its own.

It needs the right to create control groups, which mostly only root has. Versions 2 (io.max) and 1
(blkio.throttle.read_bps_device) are supported; both limit reads from the disk, not those from the page cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loaders.errors import BadSpec

CGROUPS = Path("/sys/fs/cgroup")
# A shell that joins the group and then becomes the command: the limit thus covers the command from its first read.
ENTER = 'echo $$ > "$0"; exec "$@"'


@contextmanager
def limited_reads(path: Path, bytes_per_s: int, cgroups: Path = CGROUPS) -> Iterator[list[str]]:
    """Yield the words to put before a command, so that its reads from the disk of `path` are limited to a rate.

    Raises:
        BadSpec: the system has no such control groups, or this user may not create one.
    """
    disk, own = _disk(path), f"weightmill-bench-{os.getpid()}"
    try:
        if "io" in _words(cgroups / "cgroup.controllers"):
            (cgroups / "cgroup.subtree_control").write_text("+io")
            group, limit, members = cgroups / own, f"{disk} rbps={bytes_per_s}", "cgroup.procs"
            setting = "io.max"
        elif (cgroups / "blkio" / "blkio.throttle.read_bps_device").exists():
            group, limit, members = cgroups / "blkio" / own, f"{disk} {bytes_per_s}", "tasks"
            setting = "blkio.throttle.read_bps_device"
        else:
            raise OSError(f"no io or blkio controller below {cgroups}")
        group.mkdir()
    except OSError as error:
        raise _refusal(error) from error
    try:
        try:
            (group / setting).write_text(limit)
        except OSError as error:
            raise _refusal(error) from error
        yield ["sh", "-c", ENTER, str(group / members)]
    finally:
        # A command that still runs keeps its group; the limit ends with it.
        with suppress(OSError):
            group.rmdir()


def _refusal(error: OSError) -> BadSpec:
    return BadSpec(
        f"rate: the kernel holds reads to a rate only in a control group, which could not be made here ({error});"
        " run as root on Linux, or without rate= on a disk that is slow by itself"
    )


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _disk(path: Path) -> str:
    """Return MAJOR:MINOR of the whole disk that a path is on; limits are set on disks, not on their partitions."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    folder = Path(f"/sys/dev/block/{number}")
    if not folder.exists():
        raise BadSpec(
            f"rate: {path} lies on no block device of its own ({number}), so its reads cannot be held to a rate"
        )
    folder = folder.resolve()
    return (folder.parent / "dev").read_text().strip() if (folder / "partition").exists() else number
