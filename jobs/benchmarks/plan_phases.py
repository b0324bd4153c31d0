"""A plan of a checkpoint in this process, with the CPU time of each of its phases: see planning.py, which starts it.

    python -m jobs.benchmarks.plan_phases FILE OVERRIDES

FILE gets a JSON object: `phases`, CPU seconds by phase, all threads' together, and `peak_bytes`, the largest resident
memory of the process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

# The functions of `weightmill plan` that make its phases: the phase, the module that calls it, its name there.
PHASES = (
    ("open the headers", "jobs.orchestration.preflight", "open_checkpoint"),
    ("tensors and their families", "jobs.planning.build", "tensors_of"),
    ("rules", "jobs.planning.build", "decide"),
    ("cut into units", "jobs.planning.build", "cut_units"),
    ("names and places", "jobs.orchestration.preflight", "make_plan"),
    ("choose a strategy", "jobs.orchestration.preflight", "reading"),
    ("digests of the work", "jobs.orchestration.preflight", "plan_job"),
    ("text or document", "jobs.plan", "act"),
)
START, SAY = "start Python, read the settings", "print"


class PhaseClock:
    """The CPU time of phases that call each other; the time of an inner one is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running = [START]
        self._since = 0.0

    def turn(self, *, to: str | None = None) -> None:
        """Begin a phase inside the one that runs, or end the one that runs."""
        now = time.process_time()
        phase = self._running[-1]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now
        if to is None:
            self._running.pop()
        else:
            self._running.append(to)

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts as a phase."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.turn(to=phase)
            try:
                return function(*arguments, **options)
            finally:
                self.turn()

        return call


def main(file: str, *overrides: str) -> int:
    """Plan, and write the phases to the file; returns the exit status of `weightmill plan`."""
    from jobs.orchestration import preflight

    clock = PhaseClock()
    for phase, module, name in PHASES[1:-1]:
        home = import_module(module)
        setattr(home, name, clock.timed(phase, getattr(home, name)))
    phase, _, name = PHASES[0]
    plan_job = preflight.plan_job
    opened = clock.timed(phase, getattr(preflight, name))
    patched: Any = preflight
    patched.plan_job = lambda spec, **how: plan_job(spec, opened, **how)
    status: int = _timed_verb(clock, import_module(PHASES[-1][1]).VERB).main(overrides)
    clock.turn()
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    Path(file).write_text(json.dumps({"phases": clock.seconds, "peak_bytes": usage}))
    return status


def _timed_verb(clock: PhaseClock, verb: Any) -> Any:
    """Return the verb with its work counted as the last phase, and all that follows as printing."""

    def act(spec: Any) -> Any:
        said = clock.timed(PHASES[-1][0], verb.act)(spec)
        clock.turn(to=SAY)
        return said

    return replace(verb, act=act)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
