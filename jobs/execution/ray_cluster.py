"""Units as Ray tasks, on the Ray cluster at an address or on one started here. This is the only file that imports ray.

A task gets paths, not weights, and returns a small report; its progress is a stream. Ray retries a task whose worker
process dies. When a whole machine dies, Ray 2.60 notices within seconds but retries its tasks only after minutes, so
they are submitted again here; if both attempts finish, the second replaces files by equal ones. Each task requests the
CPUs and the memory of its plan, and a request that no machine can serve is refused before anything runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from jobs.cli.early import be_program
from jobs.cli.verb import note
from jobs.execution.cluster import OnBytes, R_co, Report, Task, UnitFailed, attempt
from jobs.execution.own_ray import OwnRay
from jobs.execution.ray_watch import Watch
from jobs.spec.addresses import check_reachable
from jobs.spec.job import ClusterSpec
from loaders.backends.machine import usable_cpus
from loaders.errors import BadSpec, StorageError, WeightmillError
from loaders.places import ROOT
from loaders.storage.settings import StoreSettings, current, use
from loaders.storage.traffic import moved_bytes, traffic
from loaders.words import counted

MOST_THREADS = 8  # threads of a unit; with more cores, several units side by side use a machine better
BASE_BYTES = 300 << 20  # bytes of a worker process with its libraries, before it has any weights
# Retries of a task whose worker died: enough for preempted machines, and few enough that a task which kills its worker,
# by too much memory for instance, fails soon.
WORKER_DEATHS = 3
STOP_S = 10.0  # seconds that units get to remove their part files before they are killed
WORKERS = "(workers)"  # stands for a host in the count of what all workers have moved
ASK_S = 120.0  # seconds that a machine has to answer whether it can work, with the start of a worker
PROGRESS_S = 0.5  # seconds between two messages of progress: smooth for a person, and few for Ray


class RayCluster:
    """A `Cluster` of Ray's workers."""

    is_local = False

    def __init__(self, spec: ClusterSpec, address: str | None) -> None:
        self._spec = spec
        self._address = address
        self._at_once = 1
        self.threads = spec.threads or min(usable_cpus(), MOST_THREADS)
        self._own = None if address else OwnRay()
        try:
            self._ray = _start(spec, address, self._own)
        except BaseException:
            self._end()
            raise
        if address and not spec.threads:
            most = max((node["Resources"].get("CPU", 0) for node in self._live_nodes()), default=1)
            self.threads = max(1, min(int(most), MOST_THREADS))

    @property
    def description(self) -> str:
        nodes = self._live_nodes()
        cpus = sum(node["Resources"].get("CPU", 0) for node in nodes)
        where = f"the Ray cluster at {self._address}" if self._address else "Ray, started here"
        return f"{where}: {counted(len(nodes), 'machine')}, {cpus:.0f} CPUs, {self.threads} threads a unit"

    def _live_nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def check(self, tasks: Sequence[Task[Report]]) -> None:
        nodes = self._live_nodes()
        gpus = max((task.gpus for task in tasks), default=0)
        nodes = [node for node in nodes if node["Resources"].get("GPU", 0) >= gpus]
        if not nodes:
            raise BadSpec(
                "cluster: a unit on backend=cuda needs a GPU, and no machine offers one to Ray; use backend=cpu"
            )
        need = max((_memory(task) for task in tasks), default=0)
        fits = [
            node
            for node in nodes
            if node["Resources"].get("CPU", 0) >= self.threads and node["Resources"].get("memory", 0) >= need
        ]
        if not fits:
            largest = max(nodes, key=lambda node: node["Resources"].get("CPU", 0))["Resources"]
            raise BadSpec(
                f"cluster: a unit needs {self.threads} CPUs and {need / 1e9:.2f} GB of memory; the largest machine"
                f" offers {largest.get('CPU', 0):.0f} and {largest.get('memory', 0) / 1e9:.2f} GB; lower threads"
            )
        slots = sum(_slots(node["Resources"], self.threads, gpus) for node in nodes)
        # As many tasks wait at the machines as run there, so that none idles while the driver submits the next.
        self._at_once = self._spec.units_at_once or 2 * max(1, slots)

    def run(self, tasks: Sequence[Task[R_co]], on_bytes: OnBytes) -> Generator[R_co | UnitFailed]:
        left_out = self._left_out(tasks[0]) if self._address and tasks else []
        flights = _Flights(self._ray, self.threads, left_out)
        watch = Watch(self._ray)
        todo = {task.unit.id: task for task in tasks}
        waiting = list(reversed(tasks))
        try:
            while todo:
                while waiting and len(flights) < self._at_once:
                    flights.launch(waiting.pop())
                for unit, outcome in flights.advance(on_bytes):
                    if todo.pop(unit, None) is not None:
                        yield outcome
                        flights.forget(unit)
                for task in flights.lost(watch.dead):
                    if task.unit.id in todo:
                        flights.launch(task)
        finally:
            watch.close()
            flights.cancel()

    def _left_out(self, task: Task[Any]) -> list[str]:
        """Ask every machine whether it reads the source and writes the output; returns the ids of those that do not.

        Raises:
            StorageError: none does.
        """
        nodes = {n["NodeID"]: n["NodeManagerHostname"] for n in self._live_nodes() if n["Resources"].get("CPU", 0)}
        found = {node: reason for node, reason in self._asked(task, list(nodes)).items() if reason}
        for node, reason in found.items():
            note(f"{nodes[node]} ({node[:8]}) is left out: {reason}")
        if nodes and len(found) == len(nodes):
            raise StorageError(
                "cluster: no machine reads the source and writes the output: its workers need the same access as this"
                " process, in their own environment (credentials, mounted folders)"
            )
        return list(found)

    def _asked(self, task: Task[Any], nodes: Sequence[str]) -> dict[str, str]:
        """Return what is wrong with each machine; an empty text if nothing is."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        ask = self._ray.remote(ask_remotely)
        settings = replace(current(), patience_s=min(current().patience_s, ASK_S / 4))
        asked = {
            ask.options(num_cpus=0, max_retries=0, scheduling_strategy=On(node, soft=False)).remote(
                task, settings
            ): node
            for node in nodes
        }
        answered, silent = self._ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S)
        found = {asked[each]: f"no answer within {ASK_S:.0f} s" for each in silent}
        for each in answered:
            try:
                found[asked[each]] = self._ray.get(each)
            except self._ray.exceptions.RayError as error:
                found[asked[each]] = _said_by_ray(error)
        return found

    def close(self) -> None:
        """Disconnect; a cluster that was started here is stopped, a joined one stays."""
        self._ray.shutdown()
        self._end()

    def _end(self) -> None:
        if self._own is not None:
            self._own.close()


def _slots(resources: dict[str, Any], threads: int, gpus: int) -> int:
    """Return how many units run side by side on a machine."""
    by_cpu = int(resources.get("CPU", 0) // threads)
    return min(by_cpu, int(resources.get("GPU", 0) // gpus)) if gpus else by_cpu


def _start(spec: ClusterSpec, address: str | None, own: OwnRay | None) -> Any:
    # Ray would retry a task that is out of memory for ever.
    os.environ.setdefault("RAY_task_oom_retries", "2")
    # Tasks that reserve no GPU keep CUDA_VISIBLE_DEVICES as it is. This is Ray 2.60's default; older versions clear it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

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


def _inherited_path() -> list[str]:
    found = os.environ.get("PYTHONPATH", "")
    return found.split(os.pathsep) if found else []


def _memory(task: Task[Any]) -> int:
    return BASE_BYTES + task.memory_bytes


def ask_remotely(task: Task[Any], settings: StoreSettings) -> str:
    """Return why a Ray worker cannot do a task, with the driver's settings of stores; an empty text if it can."""
    use(settings)
    try:
        task.reach()
    except (WeightmillError, OSError) as error:
        return str(error)
    return ""


def run_remotely(task: Task[Any], settings: StoreSettings) -> Iterator[tuple[str, Any]]:
    """Run a task in a Ray worker, with the driver's settings of stores.

    Yields first its node's id, then bytes done and bytes moved from and to stores, last the outcome.

    The unit runs on a thread, so that this generator can send progress meanwhile, and so that cancelling the task,
    which interrupts the generator, can stop the unit and wait until its part files are removed.
    """
    import ray

    be_program()
    use(settings)
    yield "node", ray.get_runtime_context().get_node_id()
    stop, done = threading.Event(), threading.Event()
    counted: list[int] = [0]
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(attempt(task, lambda size: counted.__setitem__(0, counted[0] + size), stop))
        # It is raised again below, on the thread that Ray watches.
        except BaseException as error:
            found.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    told, moved = 0, dict(moved_bytes())  # a worker process runs many tasks

    def news() -> Iterator[tuple[str, Any]]:
        nonlocal told, moved
        now, then = dict(moved_bytes()), moved
        if now != then:
            moved = now
            yield "moved", {word: now[word] - then[word] for word in now}
        if counted[0] != told:
            before, told = told, counted[0]
            yield "bytes", told - before

    thread.start()
    try:
        while not done.wait(PROGRESS_S):
            yield from news()
    finally:
        # The task was cancelled, or is done. The unit removes its part files before it ends.
        stop.set()
        thread.join()
    yield from news()
    if isinstance(found[0], BaseException):
        raise found[0]
    yield "outcome", found[0]


class _Flight:
    """One submitted attempt at a task."""

    def __init__(self, task: Task[Any], stream: Any) -> None:
        self.task = task
        self.stream = stream
        self.launched_s = time.monotonic()
        self.node: str | None = None
        self.counted = 0


class _Flights:
    """All submitted attempts, by their streams of messages."""

    def __init__(self, ray: Any, threads: int, left_out: Sequence[str]) -> None:
        self._ray = ray
        # Ray before 2.47 has no such option; then it is not given unless a machine is left out.
        others = f"!in({', '.join(left_out)})"
        self._where = {"label_selector": {"ray.io/node-id": others}} if left_out else {}
        self._flights: list[_Flight] = []
        self._threads = threads
        self._remote = ray.remote(run_remotely)

    def __len__(self) -> int:
        return len(self._flights)

    def launch(self, task: Task[Any]) -> None:
        remote = self._remote.options(
            num_cpus=self._threads,
            num_gpus=task.gpus,
            memory=_memory(task),
            name=task.unit.id,
            num_returns="streaming",
            max_retries=WORKER_DEATHS,
            scheduling_strategy="SPREAD",
            **self._where,
        )
        self._flights.append(_Flight(task, remote.remote(task, current())))

    def advance(self, on_bytes: OnBytes) -> Iterator[tuple[str, Any]]:
        """Wait up to a second for messages, count bytes, and yield the outcomes among the messages."""
        if not self._flights:
            time.sleep(0.1)
            return
        by_stream = {flight.stream: flight for flight in self._flights}
        ready, _ = self._ray.wait(list(by_stream), num_returns=1, timeout=1.0, fetch_local=False)
        for stream in ready:
            flight = by_stream[stream]
            outcome = self._message(flight, on_bytes)
            if outcome is not None:
                self._flights.remove(flight)
                yield flight.task.unit.id, outcome

    def _message(self, flight: _Flight, on_bytes: OnBytes) -> Any | None:
        try:
            kind, value = self._ray.get(next(flight.stream))
        except StopIteration:
            return UnitFailed(flight.task.unit.id, "its worker ended without a report")
        except self._ray.exceptions.RayError as error:
            on_bytes(-flight.counted)
            return UnitFailed(flight.task.unit.id, _said_by_ray(error))
        if kind == "node":
            # Ray has retried the task, which counts all bytes again.
            on_bytes(-flight.counted)
            flight.node, flight.counted = value, 0
        elif kind == "moved":
            traffic(WORKERS).moved(**value)
        elif kind == "bytes":
            flight.counted += value
            on_bytes(value)
        else:
            return value
        return None

    def forget(self, unit: str) -> None:
        """Cancel other attempts at a unit that has finished."""
        for flight in [f for f in self._flights if f.task.unit.id == unit]:
            self._cancel(flight, force=False)
            self._flights.remove(flight)

    def lost(self, dead: dict[str, float]) -> list[Task[Any]]:
        """Cancel the attempts on dead machines, and those that may be stuck on the way to one; returns their tasks.

        A flight without a node has not reported where it runs; if it was submitted before a machine died, it may have
        been sent there.
        """
        if not dead:
            return []
        latest = max(dead.values())
        gone = [f for f in self._flights if f.node in dead or (f.node is None and f.launched_s < latest)]
        for flight in gone:
            self._cancel(flight, force=True)
            self._flights.remove(flight)
        return [flight.task for flight in gone]

    def cancel(self) -> None:
        """Ask all attempts to stop, wait until they have removed their part files, then kill those that are left."""
        for flight in self._flights:
            self._cancel(flight, force=False)
        deadline = time.monotonic() + STOP_S
        for flight in self._flights:
            # The stream of a cancelled task ends in one of several errors; any of them means that it has stopped.
            with contextlib.suppress(Exception):
                while time.monotonic() < deadline:
                    self._ray.get(flight.stream._next_sync(timeout_s=deadline - time.monotonic()))
            self._cancel(flight, force=True)
        self._flights.clear()

    def _cancel(self, flight: _Flight, *, force: bool) -> None:
        # The attempt has ended by itself, or its machine is gone.
        with contextlib.suppress(Exception):
            self._ray.cancel(flight.stream, force=force)


def _said_by_ray(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
