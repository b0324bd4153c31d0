"""Where units run: the machines of the cluster that can do a job's work, and the room that each has for units.

The driver places each attempt itself. So it knows where one is, units spread over unlike machines, and each machine is
asked before its first unit whether it can do the work: the first ones before anything runs, and while the job goes on
those that join late and those on which units have failed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jobs.cli.verb import note
from jobs.execution.cluster import Task
from jobs.execution.ray.fitting import MOST_BUNDLES, Scaling
from jobs.execution.ray.machines import Machine, Need, live_machines, named, on, told
from jobs.execution.ray.nodes import ASK_S, Looks, Verdict
from jobs.spec.cluster import ClusterSpec
from loaders.errors import StorageError
from loaders.storage.settings import StoreSettings, current

# Once a machine may work, the others have so many seconds more until the job begins without them.
OTHERS_S = 5.0
PAUSE_S = 0.5  # seconds to wait for answers between two looks


@dataclass(frozen=True)
class Spot:
    """A machine for an attempt: Ray's id of its node, its name for people, and the options of the Ray task."""

    node: str
    name: str
    options: Mapping[str, Any]
    threads: int = 1
    read_limit: float | None = None  # bytes a second that the attempt may read

    def task(self, task: Task[Any]) -> Task[Any]:
        """Return a task as it runs here: with fewer threads on a machine of fewer CPUs."""
        return on(task, min(task.threads, self.threads))

    @property
    def settings(self) -> StoreSettings:
        """The settings of stores for the attempt."""
        return replace(current(), read_limit=self.read_limit)


@dataclass
class _Others:
    """CPUs that other jobs use, by machine: the least of two looks, since what Ray tells is a little old."""

    last: Mapping[str, float] = field(default_factory=dict)
    now: Mapping[str, float] = field(default_factory=dict)

    def on(self, machine: str) -> float:
        return min(self.last.get(machine, 0), self.now.get(machine, 0))


class Placement:
    """Places attempts on machines. With `is_joined`, the machines are asked first whether they can do the work.

    Raises:
        StorageError: none can.
    """

    def __init__(
        self, ray: Any, spec: ClusterSpec, threads: int, tasks: Sequence[Task[Any]], *, is_joined: bool,
        said: set[str] | None = None,
    ) -> None:  # fmt: skip
        """`said` has the lines that the user has read about the cluster, to which those of now are added."""
        self._ray, self._spec, self._threads, self._tasks = ray, spec, threads, tasks
        self._has_gpu_units = any(task.gpus for task in tasks)
        self._by_architecture = any(task.by_architecture for task in tasks)
        self._architecture: str | None = None
        self._left, self._is_joined = len(tasks), is_joined
        self._others = _Others()
        self._said = set() if said is None else said
        self._scaling = Scaling(spec)
        self._largest: dict[tuple[int, int], Need] = {}
        self._flying: Mapping[str, int] = {}
        self._looks: Looks | None = None
        self._machines: dict[str, Machine] = {}
        self._out: dict[str, str] = {}  # why machines are left out, by their ids
        found = [machine for machine in live_machines(ray) if machine.fits(spec)]
        if is_joined:
            self._ask_all(found)
        else:
            self._machines = {machine.id: machine for machine in found}

    # --- where the next attempt runs

    def place(
        self,
        task: Task[Any],
        flying: Mapping[str, int],
        *,
        without: Collection[str] = (),
        memory_times: int = 1,
        with_gpu: Mapping[str, int] | None = None,
        only_free: bool = False,
    ) -> Spot | None:
        """Return where the next attempt at a task runs, or None while no machine has room.

        `flying` counts the attempts by node, and `with_gpu` those among them that hold a GPU; machines in `without` are
        not chosen: those where this task flies, or has failed, or that are dead. `memory_times` multiplies the memory
        that is requested. With `only_free`, machines whose CPUs other jobs use do not count either: on these an attempt
        waits, but in turn with those of the other jobs.
        """
        self._flying = flying
        most = self._spec.units_at_once
        if most is not None and sum(flying.values()) >= most:
            return None
        needs: dict[int, Need] = {}
        best: tuple[tuple[bool, bool, float, int], Machine, Need] | None = None
        for machine in self._machines.values():
            if machine.id in without:
                continue
            threads = machine.threads(self._threads)
            if threads not in needs:
                needs[threads] = Need.of(task, threads, memory_times)
            need, here = needs[threads], flying.get(machine.id, 0)
            units = machine.units(need, self._spec)
            if need.gpus:
                # Units that hold no GPU take CPUs here, but no room for those that do.
                gpus_taken = here if with_gpu is None else with_gpu.get(machine.id, 0)
                room = min(units - gpus_taken, self._by_cpu(machine, threads) - here)
            else:
                room = units - self._kept_for_gpus(machine) - here
            free = min(room, int((machine.cpus - self._others.on(machine.id)) // threads) - here)
            if room <= 0 or (only_free and free <= 0):
                continue
            rank = (machine.gpus == 0 or need.gpus > 0, free > 0, max(free, 0) / max(units, 1), room)
            if best is None or rank > best[0]:
                best = rank, machine, need
        return None if best is None else self._spot(best[1], best[2])

    def _spot(self, machine: Machine, need: Need) -> Spot:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        options = {**need.options(self._spec), "scheduling_strategy": On(machine.id, soft=False)}
        return Spot(machine.id, machine.name, options, need.threads, self.read_limit)

    def _by_cpu(self, machine: Machine, threads: int) -> int:
        found = int(machine.cpus // threads)
        return found if self._spec.units_per_node is None else min(found, self._spec.units_per_node)

    def _kept_for_gpus(self, machine: Machine) -> int:
        """Return how much of a machine's room is kept for units on its GPUs, while others may do what needs none."""
        has_others = any(each.gpus == 0 for each in self._machines.values())
        return int(machine.gpus) if self._has_gpu_units and has_others else 0

    @property
    def read_limit(self) -> float | None:
        """The bytes a second that one attempt may read, so that all together stay within the job's limit."""
        if self._spec.read_limit is None:
            return None
        most = sum(machine.units(self._need(machine), self._spec) for machine in self._machines.values())
        return self._spec.read_limit / max(1, min(most, self._left, self._spec.units_at_once or most))

    def hopeless(self) -> str | None:
        """Return why no unit will ever run, or None if machines are left, or are asked, or none was left out."""
        if self._machines or not self._out or (self._looks is not None and self._looks.under_way):
            return None
        return f"no machine is left; the last was left out: {next(reversed(self._out.values()))}"

    def is_crowded(self, node: str) -> bool:
        """Whether attempts wait on a machine for CPUs that other jobs use."""
        machine = self._machines.get(node)
        if machine is None:
            return False
        taken = self._flying.get(node, 0) * machine.threads(self._threads)
        return taken > 0 and self._others.on(node) > 0 and taken + self._others.on(node) > machine.cpus

    # --- which machines take part

    def refresh(
        self,
        nodes: Sequence[Mapping[str, Any]],
        left: int | None = None,
        available: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Take a new list of the cluster's nodes (`ray.nodes()`): dead ones go, new ones are asked, and come.

        `left` is how many tasks are not done yet. `available` has what is free on each node, by its id.
        """
        self._left = self._left if left is None else left
        alive = {machine.id: machine for machine in (Machine.of(node) for node in nodes if node["Alive"])}
        self._machines = {name: machine for name, machine in self._machines.items() if name in alive}
        self._out = {name: fault for name, fault in self._out.items() if name in alive}
        if self._is_joined:
            looks = self._look()
            looks.forget(looks.under_way - {*alive})
            known = {*self._machines, *self._out, *looks.under_way}
            for machine in alive.values():
                if machine.id not in known and machine.fits(self._spec):
                    looks.ask(machine)
            self._admit(looks.answered())
            self._see_others(available or {})
            self._scaling.want(self._bundles[: self._left])

    def doubt(self, node: str) -> bool:
        """Ask a machine again on which a unit has failed; returns whether to wait for its answer, which `is_out` tells.

        Where no other machine could do the unit, it is not asked. Until it has answered, nothing is placed there.
        """
        if not self._is_joined or node in self._out or len(self._machines) < 2:
            return False
        machine = self._machines.pop(node, None)
        if machine is not None:
            self._look().ask(machine)
        return True

    def is_out(self, node: str) -> bool | None:
        """Whether a machine is left out, or gone; None while it is asked."""
        if self._looks is not None and node in self._looks.under_way:
            return None
        return node not in self._machines

    def _look(self) -> Looks:
        if self._looks is None:
            self._looks = Looks(self._ray, self._tasks, ships_code=self._spec.ship_code or not self._is_joined)
        return self._looks

    def _ask_all(self, machines: Sequence[Machine]) -> None:
        looks = self._look()
        for machine in machines:
            looks.ask(machine)
        verdicts, deadline = list[Verdict](), time.monotonic() + ASK_S + PAUSE_S
        while looks.under_way and time.monotonic() <= deadline:
            verdicts += looks.answered(PAUSE_S)
            if any(not verdict.fault for verdict in verdicts):
                deadline = min(deadline, time.monotonic() + OTHERS_S)
        late = [machine for machine in machines if machine.id in looks.under_way]
        self._choose_architecture([verdict for verdict in verdicts if not verdict.fault])
        self._admit(verdicts)
        if late:
            note(f"{named(late, machines)} {'has' if len(late) == 1 else 'have'} not answered yet: others begin")
        if machines and not self._machines:
            self.close()
            raise StorageError(
                "cluster: no machine reads the source and writes the output: its workers need the same access as this"
                " process, in their own environment (credentials, mounted folders)"
            )

    def _choose_architecture(self, able: Sequence[Verdict]) -> None:
        """Of machines whose CPUs may find other bytes, the larger group works."""
        if self._by_architecture and able:
            cpus = Counter[str]()
            for verdict in able:
                assert verdict.facts is not None
                cpus[verdict.facts.architecture] += int(verdict.machine.cpus)
            self._architecture = cpus.most_common(1)[0][0]

    def _admit(self, verdicts: Any) -> None:
        """Let machines work that can, and say which cannot, and why: a line for all that have the same reason."""
        verdicts = list(verdicts)
        known = [*self._machines.values(), *(verdict.machine for verdict in verdicts)]
        out: dict[str, list[Machine]] = {}
        remarks: dict[str, list[Machine]] = {}
        for verdict in verdicts:
            fault, facts = verdict.fault, verdict.facts
            if not fault and facts is not None and self._architecture not in (None, facts.architecture):
                fault = (
                    f"its CPU is of another architecture ({facts.architecture}) than most ({self._architecture}), where"
                    " HQQ may find other bytes"
                )
            if fault:
                self._out[verdict.machine.id] = fault
                out.setdefault(fault, []).append(verdict.machine)
                continue
            self._machines[verdict.machine.id] = verdict.machine
            if verdict.remark:
                remarks.setdefault(verdict.remark, []).append(verdict.machine)
        for fault, machines in out.items():
            self.say(f"{named(machines, known)} {'is' if len(machines) == 1 else 'are'} left out: {fault}")
        for remark, machines in remarks.items():
            self.say(f"{named(machines, known)}: {remark}")

    def _see_others(self, available: Mapping[str, Mapping[str, float]]) -> None:
        """Look which CPUs other jobs use."""
        ours = {m.id: self._flying.get(m.id, 0) * m.threads(self._threads) for m in self._machines.values()}
        now = {
            machine.id: max(0.0, machine.cpus - available[machine.id].get("CPU", 0) - ours[machine.id])
            for machine in self._machines.values()
            if machine.id in available
        }
        self._others = _Others(self._others.now, now)

    # --- for people

    def say(self, line: str) -> None:
        """Tell the user, who reads a line once, though each phase of a job asks all machines."""
        if line not in self._said:
            self._said.add(line)
            note(line)

    @property
    def lines(self) -> list[str]:
        """Which machines take part, and with how many units at once."""
        rows = list(self._machines.values())
        return told(rows, {machine.id: self._need(machine) for machine in rows}, self._spec)

    def _need(self, machine: Machine) -> Need:
        """What the job's largest unit needs on a machine; of units with a GPU, if they are those that it is for."""
        threads, gpus = machine.threads(self._threads), int(self._has_gpu_units and machine.gpus > 0)
        if (threads, gpus) not in self._largest:
            tasks = [task for task in self._tasks if task.gpus == gpus] or self._tasks
            memory = max(Need.of(task, threads).memory for task in tasks)
            self._largest[threads, gpus] = Need(threads, gpus, memory)
        return self._largest[threads, gpus]

    @cached_property
    def _bundles(self) -> list[dict[str, float]]:
        """What units request of an autoscaler, those with a GPU first."""
        tasks = sorted(self._tasks, key=lambda task: -task.gpus)[:MOST_BUNDLES]
        return [Need.of(task, self._threads).bundle(self._spec) for task in tasks]

    def close(self) -> None:
        """Remove what the machines were shown, and take back what an autoscaler was asked for."""
        self._scaling.close()
        if self._looks is not None:
            self._looks.close()
