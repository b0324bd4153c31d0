"""Joining a Ray cluster, and starting one here."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from jobs.execution.ray.own import OwnRay
from jobs.spec.addresses import check_reachable
from jobs.spec.cluster import ClusterSpec
from loaders.backends.machine import usable_cpus
from loaders.errors import StorageError
from loaders.places import ROOT


def connect(spec: ClusterSpec, address: str | None, own: OwnRay | None) -> Any:
    """Return the module ray, connected to the cluster at an address or to one that is started here.

    Raises:
        StorageError: it cannot be joined, or does not start.
    """
    # Ray would retry a task that is out of memory for ever. It is repeated with more, see dispatch.py.
    os.environ.setdefault("RAY_task_oom_retries", "0")
    # After a minute without the head, Ray ends this process at once, in the middle of whatever it does. `Watch` ends
    # the job before; then there is time to tidy up.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "600")
    # Tasks that reserve no GPU keep CUDA_VISIBLE_DEVICES as it is. This is Ray 2.60's default; older versions clear it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    _silence(ray)
    stops = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    if own is None:
        _join(ray, options, str(address), ship_code=spec.ship_code)
    else:
        _start_own(ray, options, own)
    # Ray replaces the handler by one that ends the process at once, so that part files would stay. Python does not see
    # that, and has handlers of signals set in the main thread alone, as Ray does.
    if stops is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stops)
    return ray


def _join(ray: Any, options: dict[str, Any], address: str, *, ship_code: bool) -> None:
    if ship_code:
        options["runtime_env"] = {"py_modules": [str(ROOT / name) for name in ("jobs", "loaders")]}
    if address != "auto":
        check_reachable("cluster.address", address, "cluster=local runs in this process")
    try:
        ray.init(**options, address=address)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise StorageError(
            f"cluster.address: cannot join Ray at {address} ({str(error).splitlines()[0]}); is it running, and are"
            " RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) set here as on the cluster?"
        ) from error


def _start_own(ray: Any, options: dict[str, Any], own: OwnRay) -> None:
    # Workers start in another folder, from which they would not find a package that is not installed.
    path = os.pathsep.join([str(ROOT), *_inherited_path()])
    own.enter(ray)
    try:
        with own.marked():
            made = ray.init(
                **options, **own.options, num_cpus=usable_cpus(), runtime_env={"env_vars": {"PYTHONPATH": path}}
            )
        own.check(made.address_info["gcs_address"])
    # Ray raises an Exception of no class of its own when one of its processes does not start.
    except Exception as error:
        ray.shutdown()
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cluster: Ray does not start here ({own.reason(error)}); cluster=local runs in this process"
        ) from error


def _silence(ray: Any) -> None:
    """Keep messages of raylets, each of many lines, from standard output; what matters of them is said by dispatch.py.

    Ray 2.60 prints them whatever its options say, on a thread that looks this function up.
    """
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _inherited_path() -> list[str]:
    found = os.environ.get("PYTHONPATH", "")
    return found.split(os.pathsep) if found else []
