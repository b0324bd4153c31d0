"""Part `speed` of `jobs.bench gpu`: encoders on the device, its transfers, and bitsandbytes' kernel on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from jobs.benchmarks.gpu_trials import Bench, Found, Trial, finish, median_s, rate
from jobs.benchmarks.random_llama import random_bf16
from loaders.backends.threads import RANGE
from loaders.quantization.kernels import Kernels
from loaders.quantization.kernels.cpu import CpuKernels

GROUP = 64
IN_A_ROW = 8  # calls that are timed together: a single fast one would take as long as the call from Python


def trials(bench: Bench) -> Iterator[Trial]:
    """Yield trials: transfers; each encoder from host to host, as a job calls it; then encoders without transfers."""
    from loaders.quantization.kernels.torch_device import DeviceKernels

    weights = random_bf16(np.random.default_rng(2), bench.shape[0] * bench.shape[1])
    yield from _transfers(bench, weights)
    for where, kernels in ((bench.device, DeviceKernels(bench.device)), ("the CPU, one thread", CpuKernels())):
        for name, encode in encoders(kernels).items():
            yield Trial(f"{name} on {where}, host to host", partial(_by_ranges, bench, weights, encode))
    yield from _alone(bench, weights)


def encoders(kernels: Kernels) -> dict[str, Callable[[np.ndarray], object]]:
    """Return the encoders of a backend, each as a function of one range of weights."""
    packed, absmax = np.empty(RANGE // 2, np.uint8), np.empty(RANGE // GROUP, np.float32)

    def four(table: str) -> Callable[[np.ndarray], object]:
        return lambda x: kernels.encode_fourbit(
            x, "BF16", table, GROUP, packed[: x.size // 2], absmax[: x.size // GROUP]
        )

    def ternary(x: np.ndarray) -> None:
        total, quarter = float(kernels.magnitude_sums(x, "BF16").sum()), x.size // 4
        a, b, c, d = (x[k * quarter : (k + 1) * quarter] for k in range(4))
        kernels.pack_ternary((a, b, c, d), "BF16", x.size / total, packed[:quarter])

    return {
        "nf4": four("nf4"),
        "fp4": four("fp4"),
        "scales of nf4 alone": lambda x: kernels.group_absmax(x, "BF16", GROUP, absmax[: x.size // GROUP]),
        "ternary": ternary,
    }


def _by_ranges(bench: Bench, weights: np.ndarray, encode: Callable[[np.ndarray], object]) -> Found:
    def call() -> None:
        for at in range(0, weights.size, RANGE):
            encode(weights[at : at + RANGE])

    return rate(median_s(call, bench.laps), weights.nbytes)


def _transfers(bench: Bench, weights: np.ndarray) -> Iterator[Trial]:
    import torch

    wait, host = finish(bench.device), torch.from_numpy(weights).view(torch.bfloat16)
    there: Any = torch.empty(weights.size, dtype=host.dtype, device=bench.device)

    def timed(call: Callable[[], object], size: int) -> Found:
        def calls() -> None:
            for _ in range(IN_A_ROW):
                call()
            wait()

        return rate(median_s(calls, bench.laps) / IN_A_ROW, size)

    def pinned() -> Found:
        held = host.pin_memory()
        return timed(lambda: there.copy_(held, non_blocking=True), weights.nbytes)

    other, back = torch.empty_like(there), torch.empty_like(host)
    yield Trial("copy on the device, read and written", lambda: timed(lambda: other.copy_(there), 2 * weights.nbytes))
    if there.is_cuda:
        yield Trial("host to device, pinned", pinned)
    yield Trial("host to device, pageable", lambda: timed(lambda: there.copy_(host), weights.nbytes))
    yield Trial("device to host, pageable", lambda: timed(lambda: back.copy_(there), weights.nbytes))


def _alone(bench: Bench, weights: np.ndarray) -> Iterator[Trial]:
    """Yield trials without transfers: ours over ranges like a job's and over the whole weight, and bitsandbytes'."""
    import torch

    from loaders.quantization.kernels.device.fourbit import fourbit_codes

    wait = finish(bench.device)
    there = torch.from_numpy(weights).view(torch.bfloat16).to(bench.device)

    def ours(table: str, step: int) -> Found:
        def call() -> None:
            for at in range(0, weights.size, step):
                fourbit_codes(there[at : at + step].float().reshape(-1, GROUP), table)
            wait()

        return rate(median_s(call, bench.laps), weights.nbytes)

    def theirs(table: str) -> Found:
        if importlib.util.find_spec("bitsandbytes") is None:
            return Found(said="not installed")
        from bitsandbytes import functional

        def call() -> None:
            for _ in range(IN_A_ROW):
                functional.quantize_4bit(there, blocksize=GROUP, quant_type=table)
            wait()

        return rate(median_s(call, bench.laps) / IN_A_ROW, weights.nbytes)

    for table in ("nf4", "fp4"):
        yield Trial(f"{table} on {bench.device} alone, ranges as a job's", partial(ours, table, RANGE))
        yield Trial(f"{table} on {bench.device} alone, all at once", partial(ours, table, weights.size))
        yield Trial(f"bitsandbytes {table} on {bench.device} alone", partial(theirs, table))
