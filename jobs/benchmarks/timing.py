"""Timing in rotation: every lap runs every case once, so that a change in the machine's speed touches all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from loaders.backends.scratch import Scratch

SCRATCH = Scratch()  # memory that is used again, as in a job: fresh pages cost as much as decoding


@dataclass
class Case:
    """Something to time: `call` runs it once (and gives its seconds, if it times itself); `missing`: why it cannot."""

    name: str
    call: Callable[[], object] | None
    missing: str = ""
    beside: str = ""  # the case that this one is a peer of
    after: str = ""  # the encoder whose output this one measures
    seconds: list[float] = field(default_factory=list)


def rotate(cases: list[Case], repeats: int, warm_up: int = 1, *, shuffled: bool = False) -> None:
    """Time the cases in turn, after laps that do not count; one that raises becomes a row that says so.

    `shuffled`: each lap in another order, the same in every run: for cases that leave the machine's memory or disk in a
    state that the next one feels.
    """
    for lap in range(-warm_up, repeats):
        order = np.random.default_rng(lap + warm_up).permutation(len(cases)) if shuffled else range(len(cases))
        for case in (cases[index] for index in order):
            if case.call is None:
                continue
            began = time.perf_counter()
            try:
                own = case.call()
            except Exception as error:  # whatever a peer may raise is a result
                case.call, case.missing = None, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                continue
            if lap >= 0:
                case.seconds.append(own if isinstance(own, float) else time.perf_counter() - began)


def on_threads(threads: int, body: Callable[..., object], *arguments: Iterable[object]) -> None:
    """Call the body for each of the arguments; on one thread, without a pool and what starting it takes."""
    if threads == 1:
        list(map(body, *arguments))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(body, *arguments))
