"""On which machines a planned job would run, and with how many units at once."""

from __future__ import annotations

import os

from jobs.execution.choose import is_local
from jobs.execution.unit import staging_bytes
from jobs.orchestration.preflight import Planned
from loaders.words import size


def machines_of(planned: Planned) -> list[str]:
    """Return lines for the plan of a job on Ray; a joined cluster is asked which machines it has."""
    spec = planned.spec.cluster
    limit = [f"read at most {size(spec.read_limit)}/s in all"] if spec.read_limit is not None else []
    if is_local(spec):
        return limit
    from jobs.execution.ray.offer import offered

    backend, held = planned.backend[0], planned.strategy[0].held_bytes

    def memory(threads: int) -> int:
        largest = max(unit.memory_bytes(threads) for unit in planned.plan.units)
        return largest + held + staging_bytes({backend}, threads)

    address = spec.address or os.environ.get("RAY_ADDRESS")
    where = f"the Ray cluster at {address}" if address else "Ray, started here"
    found = offered(spec, address, memory, int(backend == "cuda"))
    return [*(f"{where}: {line}" for line in found), *limit]
