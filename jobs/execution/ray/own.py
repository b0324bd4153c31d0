"""What a Ray cluster of our own needs of this machine: a folder, an environment in which nobody else reaches it.

By default Ray 2.60 listens on all interfaces without asking who calls, and whoever calls may run code as this user. A
cluster that a job starts serves that job alone: its processes listen on the loopback interface, and answer only who
has a token that is made for it. Its sockets and logs lie in a folder that nobody else may enter.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from jobs.cli.verb import note
from jobs.execution.ray.processes import MARK, guard
from loaders.errors import StorageError

STORE_BYTES = 100 << 20  # bytes of Ray's object store, which holds only messages: tensors never enter it
SHARED = Path("/dev/shm")  # noqa: S108  # where Ray keeps its object store by default
NAMED = "RAY_TMPDIR"
# The path of a Unix socket may have 107 bytes on Linux, and 103 on macOS. Ray appends this to that of our folder.
LONGEST_PATH = 107 if sys.platform == "linux" else 103
OURS = "ray-"  # begins the name of the folder; mkdtemp adds eight characters
WITHIN = "r"  # Ray's own folder in ours: Ray lets everybody write to it
LONGEST_FOLDER = LONGEST_PATH - len(
    f"/{OURS}12345678/{WITHIN}/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
)
# Ray's own way to keep to the loopback interface, which it takes on systems whose firewalls would ask.
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# When Ray calls a machine dead that does not answer: after 24 s, where its own values take a minute.
HEALTH = {
    "RAY_health_check_period_ms": "3000", "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}  # fmt: skip


class OwnRay:
    """The folder and the environment of a Ray cluster that is started here; both are undone when it is closed.

    Raises:
        StorageError: there is no folder for Ray's sockets.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(_folder())
        self._stack.enter_context(_guarded(self.folder))
        self._stack.enter_context(_environment({n: value for n, value in HEALTH.items() if n not in os.environ}))
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._stack.enter_context(_environment({LOOPBACK: "0", **token}))

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ray.init."""
        found = {"address": "local", "_temp_dir": str(self.folder / WITHIN), "_node_ip_address": "127.0.0.1"}
        if not _has_shared_memory():
            found["_plasma_directory"] = str(self.folder)
        return {**found, "object_store_memory": STORE_BYTES, "include_dashboard": False}

    def enter(self, ray: Any) -> None:
        """Have Ray, which may have been imported before, take the environment of now."""
        self._stack.callback(_reread, ray)
        _reread(ray)

    def marked(self) -> AbstractContextManager[None]:
        """Within the block, processes that start bear the mark by which the cluster's guard knows them."""
        return _environment({MARK: str(self.folder)})

    def check(self, address: str) -> None:
        """Check that Ray has obeyed.

        Raises:
            StorageError: the cluster's address is one that others reach.
        """
        host = address.rpartition(":")[0].strip("[]")
        if not ip_address(host).is_loopback:
            raise StorageError(f"cluster: Ray listens at {host}, which others reach; cluster=local does without Ray")

    def reason(self, error: Exception) -> str:
        """Return in a line why Ray did not start: the first fault in its processes' logs, else Ray's own words."""
        for log in sorted(self.folder.glob(f"{WITHIN}/session_2*/logs/*.err")):
            with suppress(OSError):
                lines = log.read_text(errors="replace").splitlines()
                if lines:
                    return lines[0].partition("] ")[2] or lines[0]
        return next(iter(str(error).splitlines()), type(error).__name__)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Have a process that kills the cluster's own when the block ends, or this process does, in whatever way."""
    guarding = guard(folder, keep=NAMED in os.environ)
    try:
        yield
    finally:
        guarding.communicate()


def _reread(ray: Any) -> None:
    """Have Ray read again what it has read from the environment when it was imported."""
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(LOOPBACK, "1") != "0"
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    # A file of a token would say another than the one that is made here.
    others = ("RAY_AUTH_TOKEN_PATH",) if "RAY_AUTH_TOKEN" in values else ()
    before = {name: os.environ.pop(name, None) for name in (*values, *others)}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _has_shared_memory() -> bool:
    if sys.platform != "linux":
        return True
    try:
        found = os.statvfs(SHARED)
    except OSError:
        return False
    return os.access(SHARED, os.W_OK | os.X_OK) and found.f_bavail * found.f_frsize > STORE_BYTES


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder for Ray. It is removed at the end, unless RAY_TMPDIR names where it shall lie."""
    above = _short_enough()
    try:
        made = Path(tempfile.mkdtemp(prefix=OURS, dir=above))
    except OSError as error:
        raise StorageError(
            f"cluster: Ray needs a folder for its sockets, and {above} is none ({error.strerror});"
            f" {NAMED} names another, and cluster=local does without"
        ) from error
    try:
        yield made
    finally:
        if NAMED not in os.environ:
            shutil.rmtree(made, ignore_errors=True)


def _short_enough() -> str:
    """Return where Ray's folder shall lie: at RAY_TMPDIR, in the temporary folder, or if its path is long in /tmp."""
    found = os.environ.get(NAMED) or tempfile.gettempdir()
    if len(os.fsencode(found)) <= LONGEST_FOLDER or NAMED in os.environ:
        return found
    if sys.platform == "linux":  # elsewhere it is always long
        note(f"Ray's files go to /tmp: the path of TMPDIR is too long for its sockets; {NAMED} names another folder")
    return "/tmp"  # noqa: S108  # a fresh folder is made in it
