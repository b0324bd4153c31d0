"""Measuring in `weightmill bench kernels`: what it takes beside encoding, in a job's own trip over a weight."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from jobs.benchmarks.timing import SCRATCH
from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.clock import Clock
from loaders.dtypes import DTYPES
from loaders.quantization.measure import encode_and_measure
from loaders.quantization.scheme import Block, Scheme
from loaders.specs import TensorSpec


class MemoryView:
    """A `View` of bfloat16 weights in memory."""

    def __init__(self, weight: np.ndarray) -> None:
        self.spec = TensorSpec("bench.weight", DTYPES["BF16"], weight.shape)
        self._flat = weight.reshape(-1)

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        return self._flat[start:stop]


class _Dropped:
    """Parts that keep nothing: each range is compared from the memory that it was encoded into."""

    def write(self, role: str, start: int, data: Block) -> None:
        pass

    def read(self, role: str, start: int, stop: int) -> Block:
        raise LookupError(f"{role} from {start} to {stop} was not encoded in the range that is measured")


def measuring(weight: np.ndarray, scheme: Scheme, threads: int) -> Callable[[], float]:
    """Return a call that takes bfloat16 bits (R, C) through `encode_and_measure`, and returns the measuring's seconds.

    A range is encoded, which does not count, and is then decoded, compared and held to its bounds. With several
    threads, the seconds are those of all threads together by their number.
    """
    view = MemoryView(weight)
    stored = scheme.stored(view.spec)

    def call() -> float:
        clock = Clock()
        with Crew(threads) as crew:
            work = ThreadedWork(kernels_of("cpu"), crew, threading.Event(), SCRATCH)
            encode_and_measure(view, lambda same: same, scheme, stored, _Dropped(), work, lambda count: None, clock)
        return clock.seconds()["measure_s"] / threads

    return call
