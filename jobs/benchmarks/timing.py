"""Timing in rotation: every lap runs every case once, so that changes of the machine's speed affect all cases alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from loaders.backends.scratch import Scratch

SCRATCH = Scratch()  # memory that is reused, as in a job: fresh pages would cost as much as decoding


@dataclass
class Case:
    """A case to time. `call` runs it once, and returns its seconds if it times itself.

    `missing` says why the case cannot run.
    """

    name: str
    call: Callable[[], object] | None
    missing: str = ""
    beside: str = ""  # the case that this one is a peer of
    after: str = ""  # the encoder whose output this one measures
    seconds: list[float] = field(default_factory=list)
    taken_s: float = 0.0  # of all its laps, those that do not count too, with what it does around its own timing


def rotate(
    cases: list[Case], repeats: int, warm_up: int = 1, *, shuffled: bool = False, limit_s: float = math.inf
) -> None:
    """Time the cases in turn, after `warm_up` laps that do not count. A case that raises becomes a row that says so.

    With `shuffled`, each lap has another order, the same in every run of the benchmark. It is for cases that change the
    state of memory or disk, and so affect the next case. A case that was timed and has taken `limit_s` is left out of
    further laps.
    """
    for lap in range(-warm_up, repeats):
        order = np.random.default_rng(lap + warm_up).permutation(len(cases)) if shuffled else range(len(cases))
        for case in (cases[index] for index in order):
            if case.call is None or (case.seconds and case.taken_s >= limit_s):
                continue
            began = time.perf_counter()
            try:
                own = case.call()
            # Any error of another library is a result, and the other cases go on.
            except Exception as error:
                case.call, case.missing = None, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                continue
            case.taken_s += time.perf_counter() - began
            if lap >= 0:
                case.seconds.append(own if isinstance(own, float) else time.perf_counter() - began)


def on_threads(threads: int, body: Callable[..., object], *arguments: Iterable[object]) -> None:
    """Call the body for each of the arguments; one thread needs no pool, and so not the time to start one."""
    if threads == 1:
        list(map(body, *arguments))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(body, *arguments))
