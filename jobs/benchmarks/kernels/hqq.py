"""The rows of `weightmill bench kernels` for HQQ: our encoder, both passes, and the hqq package's own quantizer.

hqq takes minutes for a large weight, so both are timed on a part of the rows, and the seconds are multiplied.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jobs.benchmarks.kernels.measuring import MemoryView
from loaders.backends import kernels_of
from loaders.backends.threads import Crew, ThreadedWork
from loaders.quantization.memory_parts import MemoryParts
from loaders.quantization.schemes.hqq import Hqq

PART = 16  # the weight's rows are cut to one sixteenth
ROWS = ((4, 1), (4, 0), (3, 1), (8, 1))  # (bits, axis) of each case


def rows(weight: np.ndarray, threads: int) -> Iterator[tuple[str, Callable[[], float] | None, str, str]]:
    """Yield (name, call that returns seconds, why it is missing, the row it is a peer of), for bfloat16 bits (R, C)."""
    some = weight[: max(1, weight.shape[0] // PART)]
    times = weight.shape[0] / some.shape[0]
    has_peer = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("hqq") is not None
    for bits, axis in ROWS:
        name = f"hqq{bits} g64 axis {axis}, bf16 (a {PART}th, times {PART})"
        scheme: Any = Hqq(bits, 64, axis)  # type: ignore[arg-type]
        refusal = scheme.refuses(MemoryView(some).spec)
        if refusal:
            yield name, None, refusal, ""
            continue
        yield name, _timed(_ours(some, scheme, threads), times), "", ""
        missing = "" if has_peer else "not installed: hqq"
        yield (
            f"hqq's own, {bits} bits axis {axis}",
            _timed(_peer(some, scheme), times) if has_peer else None,
            missing,
            name,
        )


def _timed(call: Callable[[], object], times: float) -> Callable[[], float]:
    def seconds() -> float:
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * times

    return seconds


def _ours(weight: np.ndarray, scheme: Hqq, threads: int) -> Callable[[], object]:
    view = MemoryView(weight)
    sink = MemoryParts(scheme.stored(view.spec))

    def call() -> None:
        with Crew(threads) as crew:
            scheme.encode(view, sink, ThreadedWork(kernels_of("cpu"), crew, threading.Event()))

    return call


def _peer(weight: np.ndarray, scheme: Hqq) -> Callable[[], object]:
    def call() -> object:
        torch, quantize = importlib.import_module("torch"), importlib.import_module("hqq.core.quantize")
        tensor = torch.from_numpy(weight).view(torch.bfloat16)
        return quantize.Quantizer.quantize(
            tensor, nbits=scheme.bits, group_size=scheme.group_size, axis=scheme.axis, optimize=True,
            round_zero=scheme.rounds_zero, device="cpu", compute_dtype=torch.bfloat16,
        )  # fmt: skip

    return call
