"""The choice of backend=auto: a GPU only where it is measured to encode a scheme faster than the CPU's threads.

Both encode the same weights, from and to the CPU's memory, and measure the error as jobs do. What they store is
compared, so that a device of other bytes is never taken.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import cache

import numpy as np

from loaders.backends import kernels_of
from loaders.backends.machine import may_have_gpu
from loaders.backends.threads import RANGE, Crew, ThreadedWork
from loaders.clock import Clock
from loaders.dtypes import DTYPES
from loaders.errors import BadSpec
from loaders.quantization.kernels import casts
from loaders.quantization.memory_parts import MemoryParts
from loaders.quantization.scheme import Block, Scheme, searched_on
from loaders.quantization.schemes.plain import Plain
from loaders.specs import TensorSpec
from loaders.storage.hashes import digest

DEVICE = "cuda"  # the others are not tried: MPS may store other bytes, and MLX on a GPU does
# Bytes that a few cores encode in about the time in which torch is imported. For fewer, nothing is measured.
LEAST_BYTES = 3 << 30
START_S = 4.0  # how much longer an H100's driver and torch's import made a command with backend=cuda
COLUMNS = 4096  # of the weights that are encoded
FEWEST_RANGES = 8  # to encode: of fewer, the first and the last copy would count too much
LAPS = 3  # the fastest of so many counts, after one that is not timed


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bytes of source that a backend encodes and measures a second, and a digest of what it has stored.

    `cpu_rate` is by the seconds of one CPU that all threads took, which other processes on the machine hardly change.
    """

    rate: float
    digest: str
    cpu_rate: float = 0.0


def fastest(scheme: Scheme, dtype: str, size: int, threads: int) -> tuple[str, str]:
    """Return the backend on which weights of a dtype are encoded fastest, and the reason.

    `size` is the bytes of source to encode; on the CPU, `threads` threads do so. Where scheme or machine leave no
    choice, nothing is imported or measured.
    """
    if isinstance(scheme, Plain):
        return "cpu", "nothing is encoded"
    if DEVICE in searched_on(scheme):
        return "cpu", f"on a GPU its search may find other codes; backend={DEVICE} asks for them"
    if DEVICE not in scheme.backends:
        others = " or ".join(name for name in scheme.backends if name != "cpu")
        return "cpu", "no GPU stores the same bytes" + (f"; backend={others} asks for another" if others else "")
    if not may_have_gpu():
        return "cpu", "there is no GPU here"
    if size < LEAST_BYTES:
        return "cpu", "so little is encoded before a GPU has started"
    # Schemes are frozen dataclasses, which mypy does not see in the protocol.
    host = encoded("cpu", scheme, dtype, threads)  # type: ignore[arg-type]
    said = f"{threads} threads encode {host.rate / 1e9:.1f} GB/s"
    if size / host.rate < START_S:
        return "cpu", f"{said}, and so all of it before a GPU has started"
    try:
        device = encoded(DEVICE, scheme, dtype, threads)  # type: ignore[arg-type]
    # BadSpec: torch is missing or sees no GPU. RuntimeError: the GPU does not work, or has no memory left.
    except (BadSpec, RuntimeError) as error:
        return "cpu", f"{said}; {error}"
    both = f"{said}, {DEVICE} {device.rate / 1e9:.1f}"
    if device.digest != host.digest:
        return "cpu", f"{both}, but {DEVICE} stores other bytes"
    return DEVICE if device.rate > host.rate else "cpu", both


@cache  # jobs of a sweep are to agree, and to measure once
def encoded(backend: str, scheme: Scheme, dtype: str, threads: int) -> Encoded:
    """Encode and measure random weights by a backend, from the CPU's memory into it, and return its speed.

    Raises:
        BadSpec: the machine has no such device.
    """
    from loaders.quantization.measure import encode_and_measure  # kernels, which planning does without

    weights = _Weights(dtype, max(threads, FEWEST_RANGES) * RANGE // COLUMNS)
    stored = scheme.stored(weights.spec)
    parts = MemoryParts(stored)
    with Crew(threads) as crew:
        work = ThreadedWork(kernels_of(backend), crew, threading.Event())
        taken, used = [], []
        for _ in range(1 + LAPS):
            began, before = time.perf_counter(), time.process_time()
            encode_and_measure(weights, lambda view: view, scheme, stored, parts, work, lambda count: None, Clock())
            taken.append(time.perf_counter() - began)
            used.append(time.process_time() - before)
    stored_digest = " ".join(digest(part.view(np.uint8)) for _, part in sorted(parts.parts().items()))
    size = weights.raw.nbytes
    return Encoded(size / min(taken[1:]), stored_digest, size / max(1e-9, min(used[1:])))


class _Weights:
    """A `View` of random weights (rows, COLUMNS) in memory; a range of them is repeated."""

    def __init__(self, dtype: str, rows: int) -> None:
        self.spec = TensorSpec("w.weight", DTYPES[dtype], (rows, COLUMNS))
        values = np.random.default_rng(0).standard_normal(min(RANGE, rows * COLUMNS)).astype(np.float32) * 0.02
        self.raw = np.resize(casts.cast(values, "F32", dtype), rows * COLUMNS)

    def read(self, start: int, stop: int, slot: int = 0) -> Block:
        return self.raw[start:stop]
