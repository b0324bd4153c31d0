"""Part `speed` of `weightmill bench gpu`: encoders on the device, its transfers, and bitsandbytes' kernel on it."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from jobs.benchmarks.gpu.bytes import InMemory, device_presets, searched_presets
from jobs.benchmarks.gpu.trials import Bench, Found, Trial, finish, median_s, rate
from jobs.benchmarks.random_llama import random_bf16
from loaders.backends.machine import usable_cpus
from loaders.backends.threads import RANGE, Crew, ThreadedWork
from loaders.clock import Clock
from loaders.dtypes import DTYPES
from loaders.presets.catalog import preset
from loaders.quantization.kernels import Kernels
from loaders.quantization.kernels.cpu import CpuKernels
from loaders.quantization.measure import encode_and_measure
from loaders.quantization.memory_parts import MemoryParts
from loaders.quantization.schemes.compressed_tensors_int import EPS
from loaders.specs import TensorSpec

GROUP = 64
IN_A_ROW = 8  # calls that are timed together: a single fast one would take as long as the call from Python


def trials(bench: Bench) -> Iterator[Trial]:
    """Yield trials: transfers; each preset from host to host, as a job encodes; then encoders without transfers.

    With all threads, presets are measured, too, as jobs do.
    """
    from loaders.quantization.kernels.torch_device import DeviceKernels

    weights = random_bf16(np.random.default_rng(2), bench.shape[0] * bench.shape[1])
    yield from _transfers(bench, weights)
    for where, kernels in ((bench.device, DeviceKernels(bench.device)), ("the CPU", CpuKernels())):
        for name in device_presets():
            # Copies run beside encoders only where several threads encode.
            for threads in dict.fromkeys((1, usable_cpus())):
                case = f"{name} on {where}, host to host, {threads} thread{'s' if threads > 1 else ''}"
                yield Trial(case, partial(_encoded, bench, weights, kernels, name, threads))
        for name in (*device_presets(), *searched_presets()):
            case = f"{name} on {where}, encoded and measured, all threads"
            yield Trial(case, partial(_measured, bench, weights, kernels, name))
    yield from _alone(bench, weights)


def _encoded(bench: Bench, weights: np.ndarray, kernels: Kernels, name: str, threads: int) -> Found:
    scheme = preset(name).scheme
    view = InMemory(TensorSpec("w.weight", DTYPES["BF16"], bench.shape), weights)
    parts = MemoryParts(scheme.stored(view.spec))
    with Crew(threads) as crew:
        work = ThreadedWork(kernels, crew, threading.Event())
        return rate(median_s(lambda: scheme.encode(view, parts, work), bench.laps), weights.nbytes)


def _measured(bench: Bench, weights: np.ndarray, kernels: Kernels, name: str) -> Found:
    scheme = preset(name).scheme
    view = InMemory(TensorSpec("w.weight", DTYPES["BF16"], bench.shape), weights)
    stored = scheme.stored(view.spec)
    parts = MemoryParts(stored)
    with Crew(usable_cpus()) as crew:
        work = ThreadedWork(kernels, crew, threading.Event())

        def call() -> None:
            encode_and_measure(view, lambda seen: seen, scheme, stored, parts, work, lambda count: None, Clock())

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

    wait = finish(bench.device)
    there = torch.from_numpy(weights).view(torch.bfloat16).to(bench.device)

    def ours(encode: Callable[[Any], object], step: int) -> Found:
        def call() -> None:
            with torch.inference_mode():
                for at in range(0, weights.size, step):
                    encode(there[at : at + step])
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

    columns = bench.shape[1]
    for name, encode in _encoders(columns).items():
        by_range = partial(ours, encode, -(-RANGE // columns) * columns)
        yield Trial(f"{name} on {bench.device} alone, ranges as a job's", by_range)
        yield Trial(f"{name} on {bench.device} alone, all at once", partial(ours, encode, weights.size))
    for table in ("nf4", "fp4"):
        yield Trial(f"bitsandbytes {table} on {bench.device} alone", partial(theirs, table))


def _encoders(columns: int) -> dict[str, Callable[[Any], object]]:
    """Return one encoder of each kind, as a function of bfloat16 weights (n,) on the device, whole rows of them."""
    from loaders.quantization.kernels.device import affine, compare, decode, ggml, rows_and_groups
    from loaders.quantization.kernels.device.fourbit import fourbit_codes

    eps = float(EPS["BF16"])

    def measured_nf4(x: Any) -> None:
        packed, absmax = fourbit_codes(x.reshape(-1, GROUP), "nf4")
        compare.sums(x, decode.fourbit(packed, absmax, "nf4", GROUP))

    return {
        "nf4": lambda x: fourbit_codes(x.reshape(-1, GROUP), "nf4"),
        "nf4 encoded and measured": measured_nf4,
        "int8": lambda x: rows_and_groups.int8_rows(x.float().reshape(-1, columns)),
        "w4a16": lambda x: rows_and_groups.packed_groups(x.float().reshape(-1, 128), "BF16", 4, eps),
        "fp8_dynamic": lambda x: rows_and_groups.e4m3_rows(x.float().reshape(-1, columns), "BF16", eps),
        "mlx_int4": lambda x: affine.affine_groups(x.float().reshape(-1, GROUP), 4),
        "gguf_q8_0": lambda x: ggml.q8_0(x.float().reshape(-1, 32)),
        "gguf_q4_0": lambda x: ggml.q4_0(x.float().reshape(-1, 32)),
    }
