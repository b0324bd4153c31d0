"""Whether a job's units fit on the machines of a cluster, and waiting for machines that they fit on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from jobs.cli.verb import note
from jobs.execution.cluster import Task
from jobs.execution.ray.machines import Machine, Need, live_machines
from jobs.spec.cluster import ClusterSpec
from loaders.errors import BadSpec

LOOK_S = 1.0  # seconds between two looks while machines are waited for
HEARD_S = 5.0  # seconds that an autoscaler's head has at the end to take a request
MOST_BUNDLES = 1000  # units for which an autoscaler is asked at once: it packs them, one by one, onto machines


class Scaling:
    """What a cluster's autoscaler is asked for; nothing is asked unless the job waits for machines (`wait_s`).

    Ray keeps one request for a cluster, so of two jobs that scale it at once the last one's counts. It is asked on a
    thread, since a head that does not answer would hold up the job.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._wanted: list[dict[str, float]] = []
        self._asked: list[dict[str, float]] = []
        self._turn = threading.Lock()
        self._asking: threading.Thread | None = None

    def want(self, bundles: Sequence[dict[str, float]]) -> None:
        """Ask that the cluster has room for all of these at once. Fewer than before let it shrink."""
        wanted = list(bundles)[: min(MOST_BUNDLES, self._spec.units_at_once or MOST_BUNDLES)]
        is_asking = self._asking is not None and self._asking.is_alive()
        if self._spec.wait_s and wanted != (self._wanted if is_asking else self._asked):
            self._wanted = wanted
            self._asking = threading.Thread(target=self._ask, name="ray-scaling", daemon=True)
            self._asking.start()

    def _ask(self) -> None:
        from ray.autoscaler.sdk import request_resources

        # A cluster whose head does not answer is another part's to notice.
        with self._turn, suppress(Exception):
            if (wanted := self._wanted) != self._asked:
                request_resources(bundles=wanted)
                self._asked = wanted

    def close(self) -> None:
        """Take back what was asked for; waits a little until that is heard."""
        self.want([])
        if self._asking is not None:
            self._asking.join(HEARD_S)


def await_machines(ray: Any, spec: ClusterSpec, scaling: Scaling) -> None:
    """Wait, up to `wait_s`, until there is any machine with the labels and resources that the settings ask for.

    Raises:
        BadSpec: there is none.
    """
    _await(ray, spec, lambda machines: "" if machines else _lacking(spec), lambda: scaling.want([{"CPU": 1}]))


def check_fits(ray: Any, spec: ClusterSpec, threads: int, tasks: Sequence[Task[Any]], scaling: Scaling) -> None:
    """Check that units of each kind, with a GPU and without, fit on a machine; wait for one, up to `wait_s`.

    Raises:
        BadSpec: they fit on none.
    """
    kinds = {gpus: [task for task in tasks if task.gpus == gpus] for gpus in {task.gpus for task in tasks}}
    largest = [max(rows, key=lambda task: task.memory_bytes) for _, rows in sorted(kinds.items())]
    needs = [Need.of(task, task.threads) for task in largest]

    def fault(machines: Sequence[Machine]) -> str:
        if not machines:
            return _lacking(spec)
        return next((found for task in largest if (found := _unfit(machines, task, threads, spec))), "")

    _await(ray, spec, fault, lambda: scaling.want([need.bundle(spec, with_memory=True) for need in needs]))


def _await(ray: Any, spec: ClusterSpec, fault: Callable[[list[Machine]], str], ask: Callable[[], None]) -> None:
    deadline, said = time.monotonic() + spec.wait_s, ""
    while found := fault([machine for machine in live_machines(ray) if machine.fits(spec)]):
        left = deadline - time.monotonic()
        if left <= 0:
            waited = f" (waited {spec.wait_s:.0f} s)" if spec.wait_s else ""
            raise BadSpec(f"cluster: {found}{waited}")
        if found != said:
            note(f"waiting up to {left:.0f} s for a machine: {found}")
            said = found
        ask()
        time.sleep(min(LOOK_S, left))


def _lacking(spec: ClusterSpec) -> str:
    """Say that no machine has what the settings ask for."""
    asked = [*(f"the label {name}={value}" for name, value in spec.labels.items())]
    asked += [f"{amount:g} of the resource {name}" for name, amount in spec.resources.items()]
    return f"no machine offers a CPU{''.join(f' and {each}' for each in asked)}"


def _unfit(machines: Sequence[Machine], task: Task[Any], threads: int, spec: ClusterSpec) -> str:
    """Say why a task fits on none of some machines; an empty text if it fits on one."""
    with_gpu = [machine for machine in machines if machine.gpus >= task.gpus]
    if not with_gpu:
        return "a unit on backend=cuda needs a GPU, and no machine offers one to Ray; use backend=cpu"
    largest = max(with_gpu, key=lambda machine: (machine.cpus, machine.offers.get("memory", 0)))
    has_cpus = largest.cpus >= threads
    if has_cpus and any(machine.units(Need.of(task, machine.threads(threads)), spec) > 0 for machine in with_gpu):
        return ""
    need = Need.of(task, threads)
    return (
        f"a unit needs {threads} CPUs and {need.memory / 1e9:.2f} GB of memory; the largest machine offers"
        f" {largest.cpus:.0f} and {largest.offers.get('memory', 0) / 1e9:.2f} GB; lower threads"
    )
