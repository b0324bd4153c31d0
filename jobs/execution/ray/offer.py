"""What a cluster offers to a job that is only planned: which machines would take part. Nothing runs there."""

from __future__ import annotations

import socket
from collections.abc import Callable

from jobs.execution.ray.machines import BASE_BYTES, MOST_THREADS, Machine, Need, live_machines, threads_of, told
from jobs.execution.ray.start import connect
from jobs.spec.cluster import ClusterSpec
from loaders.backends.machine import total_memory, usable_cpus
from loaders.errors import StorageError


def offered(spec: ClusterSpec, address: str | None, memory: Callable[[int], int], gpus: int) -> list[str]:
    """Return which machines would take part with how many units at once, or in a line why that is not known.

    `memory` gives the bytes that the largest unit holds with so many threads, and `gpus` the GPUs that it takes.
    """
    if address is None:
        threads = spec.threads or min(usable_cpus(), MOST_THREADS)
        offers = {"CPU": float(usable_cpus()), "GPU": float(gpus), "memory": float(total_memory())}
        machines = [Machine(id="", name=socket.gethostname(), offers=offers, labels={})]
    else:
        try:
            ray = connect(spec.model_copy(update={"ship_code": False}), address, None)
        except StorageError as error:
            return [f"its machines are not known: {error}"]
        try:
            machines = [machine for machine in live_machines(ray) if machine.fits(spec)]
        finally:
            ray.shutdown()
        threads = threads_of(machines, spec)
    needs = {m.id: Need(m.threads(threads), gpus, BASE_BYTES + memory(m.threads(threads))) for m in machines}
    able = [machine for machine in machines if machine.units(needs[machine.id], spec) > 0]
    return told(able, needs, spec) or ["no machine offers what a unit needs"]
